"""The inference room: text out of a trained model."""

from gptjax.inference.decoding import Decoder, bucket
from gptjax.inference.generator import Continuation, Generator
from gptjax.inference.sampling import Sampling, never_drawn, sample

__all__ = ['Continuation', 'Decoder', 'Generator', 'Sampling', 'bucket', 'never_drawn', 'sample']
