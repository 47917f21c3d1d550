"""What a model costs, from its config alone."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from gptjax.config import ModelConfig
from gptjax.model.parameters import blueprint
from gptjax.sharding import AXES


def parameter_count(config: ModelConfig, context: int) -> int:
  """Elements of all parameters; learned positions count, a tied head counts once."""
  return sum(math.prod(s.shape) for s in blueprint(config, context).shapes.values())


def flops_per_token(config: ModelConfig, context: int, *, causal: bool = True) -> int | float:
  """FLOPs of a forward and backward pass per token of a row of `context` tokens.

  Convention: a multiply and an add are two FLOPs; the backward pass costs twice the forward; only matrix products count:
  6 per weight of every matrix the token passes (the output head is one, embedding lookups are none), and for the scores
  and the mixing of attention 12 * layers * width * keys. `causal` counts the keys a token can see, (context + 1) / 2 on
  average, which is the work that is needed; otherwise the full square as PaLM (arXiv:2204.02311, appendix B) and nanoGPT.
  """
  plan = blueprint(config, context)
  weights = sum(math.prod(shape.shape) for name, shape in plan.shapes.items() if name.endswith('kernel'))
  if config.tied:
    weights += math.prod(plan.shapes['tokens/table'].shape)
  keys = (context + 1) / 2 if causal else context
  return 6 * weights + 12 * config.layers * config.heads * config.head_width * keys


def activation_bytes(config: ModelConfig, context: int, sequences: int) -> int:
  """Bytes that the backward pass of `sequences` rows keeps from the forward pass.

  Read off the abstract trace of the loss, so it follows the remat policy; the compiler may need less, by fusion.
  Over the `data` axis the figure divides by the number of devices.
  """
  plan = blueprint(config, context)

  def kept(rows: int) -> int:
    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32)
    loss = lambda weights, tokens: jax.nn.logsumexp(plan.merge(weights)(tokens), -1).sum()
    residuals = jax.eval_shape(lambda *inputs: jax.vjp(loss, *inputs)[1], plan.shapes, tokens)
    return sum(math.prod(r.shape) * r.dtype.itemsize for r in jax.tree.leaves(residuals))

  one_device = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
  with jax.set_mesh(None), use_abstract_mesh(one_device):  # a mesh in force may not be replaced by one of another size
    # What does not grow with the rows is no activation: weights, and masks shared by all rows.
    return sequences * (kept(2) - kept(1))
