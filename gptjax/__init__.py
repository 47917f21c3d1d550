"""Build large language models from scratch in JAX: from raw text to a trained, evaluated, sampled transformer."""

__version__ = '0.1.0'
