"""Build large language models from scratch in JAX: from raw text to a trained, evaluated, sampled transformer."""

from gptjax import signals

signals.install_handlers()  # before the programs import what takes seconds

__version__ = '0.1.0'
