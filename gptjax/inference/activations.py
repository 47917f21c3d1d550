"""A forward pass that returns what is inside the model: the hidden states of all layers, and the attention weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from gptjax.inference.forward import forward
from gptjax.model import AbstractModel, abstract_model, positions_of
from gptjax.sharding import BATCH_SPEC


class Activations(NamedTuple):
  """What a forward pass computes for B rows of T tokens."""

  logits: Float[Array, 'B T V']
  """of the next token, or of the classes, in float32"""
  hidden_states: tuple[Float[Array, 'B T D'], ...] = ()
  """the residual stream: embeddings, then the output of each block; the last one is not normalized yet"""
  attentions: tuple[Float[Array, 'B H T T'], ...] = ()
  """of each block: the weight of each key (last axis) for each query, in float32"""


@functools.lru_cache(maxsize=16)
def activations(model: AbstractModel, mesh: Mesh, hidden_states: bool, attentions: bool) -> Callable[..., Activations]:
  """Jitted (parameters, tokens [B, T]) -> Activations, complete on every device; rows are documents from position 0.

  Layers run one by one. Attention weights take the memory of the T x T squares that attention itself avoids.
  """
  plain = abstract_model(dataclasses.replace(model.config, dropout=0.0), model.compute.plain, model.context)

  def local(module, tokens):
    positions, weights = positions_of({'tokens': tokens}), []
    states = [module.embed(tokens, positions, None)]
    for number, block in enumerate(module.blocks):
      if attentions:
        block.attention.watch = weights.append
      states.append(block(states[-1], number, positions, None, None, None)[0])
    logits = module.head.logits(module.norm(states[-1]))
    rows = lambda x: jax.lax.reshape(x, (*tokens.shape, x.shape[-1]), out_sharding=PartitionSpec(None, *jax.typeof(x).sharding.spec))
    return Activations(rows(logits), tuple(map(rows, states)) if hidden_states else (), tuple(weights))

  @jax.jit
  def run(parameters, tokens):
    found = forward(plain, mesh, 0, local, (BATCH_SPEC,), BATCH_SPEC)(plain.in_layout(parameters, model.slots), tokens)
    found = jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()), found)
    return found._replace(logits=found.logits[..., :model.config.classes or model.config.vocab_size])

  return run
