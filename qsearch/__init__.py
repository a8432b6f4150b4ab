"""qsearch: search per-layer quantization of a vision model over measured, compiled modules."""

__version__ = "0.1.0"
