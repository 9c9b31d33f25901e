"""HTTP: one gateway's port, and the words that clients use on it."""
