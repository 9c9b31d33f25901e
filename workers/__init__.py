"""Node processes: engines that compute, the KV pool's bytes, and their transfer between nodes."""
