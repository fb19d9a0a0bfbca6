"""Concertina: Mixture-of-Experts training that folds and stretches. The floors are drawn in platform/README.md."""

__all__ = ["__version__"]

__version__ = "0.1.0"
