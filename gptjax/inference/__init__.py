"""The inference room: text out of a trained model."""

from gptjax.inference.generate import Generator, Sampling, sample

__all__ = ['Generator', 'Sampling', 'sample']
