"""Measurements: each runnable alone as `python -m bench.NAME`, printing a table and writing JSON."""
