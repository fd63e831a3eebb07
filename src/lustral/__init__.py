"""Find, show and erase backdoors in neural networks."""

__version__ = "0.1.0"
__all__ = ["__version__"]
