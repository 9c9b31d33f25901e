"""The article's claims, a file each: what is stated, how ours comes about, the verdict, and the sections behind it."""
