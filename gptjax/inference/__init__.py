"""Text generation with a trained model."""

from gptjax.inference.decoding import Decoder, bucket
from gptjax.inference.generator import Continuation, Generator
from gptjax.inference.prompts import Prompt, read_prompts
from gptjax.inference.sampling import Sampling, never_drawn, sample

__all__ = ['Continuation', 'Decoder', 'Generator', 'Prompt', 'Sampling', 'bucket', 'never_drawn', 'read_prompts', 'sample']
