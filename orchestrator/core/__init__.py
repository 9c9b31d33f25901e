"""Every decision Weft takes, as pure state machines: no clock, loop, socket, thread, file, environment or log."""
