"""Searches clusters with the simulator: which one serves a trace as fast as is asked, for the least money."""
