"""Brings clusters up: the `weft` command, cluster files, manifests."""
