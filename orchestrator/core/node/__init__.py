"""One node's decisions: its steps and its KV blocks."""
