"""Trinity's trainer: records in, a verified GGUF release out. `python -m trainer --help` is the way in."""

__version__ = "0.1.0"
