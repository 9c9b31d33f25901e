"""The `weft` command: one module a verb, and what several of them share."""
