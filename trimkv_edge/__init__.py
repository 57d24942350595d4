"""trimkv-edge: language models that run without end in a fixed amount of memory."""

__version__ = "0.1.0"
