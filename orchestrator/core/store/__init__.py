"""One host's store of KV below its nodes' memory: the arena that they share, and the way to cmx."""
