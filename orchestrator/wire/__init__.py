"""The core's nouns as bytes: generated protobuf stubs and the codec between them and the core's dataclasses.

Beside it stands what both ends of a wire need and neither owns, gateway or node: the journal of a core and its replay, lines of
logs, the clock that drives a core's timers, and who may speak.
"""
