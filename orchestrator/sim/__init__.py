"""Drives the core in virtual time: the same policies, on hardware that need not be there."""
