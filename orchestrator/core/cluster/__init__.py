"""One gateway's view of the cluster, and what it decides: routing, admission, sessions, the KV index."""
