"""Parameters and FLOPs of a model, from its config alone."""

import functools
import math

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model.parameters import abstract_model


@functools.cache  # the search for a layout calls both many times
def parameter_count(config: ModelConfig, context: int) -> int:
  """Elements of all parameters; learned positions count, a tied head counts once."""
  return sum(math.prod(s.shape) for s in abstract_model(config, ComputeConfig(), context).shapes.values())


@functools.cache
def flops_per_token(config: ModelConfig, context: int, *, causal: bool = True) -> int | float:
  """FLOPs of a forward and backward pass per token of rows of `context` tokens.

  Convention: a multiply and an add are two FLOPs; the backward pass costs twice the forward; only matrix products count:
  6 per weight of every matrix the token passes (the output head is one, embedding lookups are none), and for the scores
  and the mixing of attention 12 * width * keys in each layer. `causal` counts the keys a token can see, (context + 1) / 2 on
  average or fewer with a window, which is the work that is needed; otherwise the full square as PaLM (arXiv:2204.02311,
  appendix B) and nanoGPT.
  """
  model = abstract_model(config, ComputeConfig(), context)
  weights = sum(math.prod(shape.shape) for name, shape in model.shapes.items() if name.endswith('kernel'))
  if config.tied:
    weights += math.prod(model.shapes['tokens/table'].shape)
  def keys(layer):
    seen = context if config.sees_all(layer) else min(context, config.window)
    return (seen * (seen + 1) / 2 + (context - seen) * seen) / context if causal else context
  return 6 * weights + 12 * config.heads * config.head_width * sum(map(keys, range(config.layers)))
