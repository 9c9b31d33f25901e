"""Drives the core in real time: HTTP gateway, gRPC links to the nodes, metrics."""
