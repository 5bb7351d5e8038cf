"""Self-supervised image pre-training by reconstruction, in JAX."""

__version__ = "0.1.0"
