"""Hardware and model shapes as data, each number with its source, and what follows from them for a cluster."""
