"""The inference room: text out of a trained model."""

from gptjax.inference.generate import Generator, Sampling, never_drawn, sample

__all__ = ['Generator', 'Sampling', 'never_drawn', 'sample']
