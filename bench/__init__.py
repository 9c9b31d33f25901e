"""Measurements, run as `python -m bench.NAME`, which print a table and write JSON; and the parts they are made of."""
