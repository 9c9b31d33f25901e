"""Split decode: a layer's two halves in different processes, attention ranks and FFN ranks."""
