"""Engines that keep a beat: computing in a process that does nothing else, one step a beat, on time."""
