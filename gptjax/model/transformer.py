"""The decoder-only transformer: GPT-2's style and the modern one are configs of one class."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig
from gptjax.model.attention import Attention, Cache, Place
from gptjax.model.layers import Embedding, Linear, Norm, Stack, dropout, whole
from gptjax.sharding import spec


class MLP(nnx.Module):
  """The feed-forward layer: GELU between two matrices, or SwiGLU (arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    wide = (config.width, config.hidden_width)
    self.up = Linear(wide, ('embed', 'mlp'), 0.02, config, rngs, stack)
    self.gate = Linear(wide, ('embed', 'mlp'), 0.02, config, rngs, stack) if config.mlp == 'swiglu' else None
    self.down = Linear(wide[::-1], ('mlp', 'embed'), 0.02 / math.sqrt(2 * config.layers), config, rngs, stack)

  def __call__(self, x: Float[Array, 'N D']) -> Float[Array, 'N D']:
    hidden = jax.nn.gelu(self.up(x), approximate=True) if self.gate is None else jax.nn.silu(self.gate(x)) * self.up(x)
    return self.down(hidden)


class Block(nnx.Module):
  """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    self.attention_norm = Norm(config.width, 'embed', config, rngs, stack)
    self.attention = Attention(config, rngs, stack)
    self.mlp_norm = Norm(config.width, 'embed', config, rngs, stack)
    self.mlp = MLP(config, rngs, stack)
    self.dropout = config.dropout

  def __call__(self, x: Float[Array, 'N D'], place: Place, cache: Cache | None,
               key: PRNGKeyArray | None) -> tuple[Float[Array, 'N D'], Cache | None]:
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    y, cache = self.attention(self.attention_norm(x), place, cache, keys[0])
    x = x + dropout(y, self.dropout, keys[1])
    return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout, keys[2]), cache


class Transformer(nnx.Module):
  """Token ids to logits.

  Args:
    config: sizes and style; vocab_size must be known (not 0).
    context: tokens that learned positions reach; rotary positions have no such bound.
    rngs: source of the initial parameters: normal with standard deviation 0.02, smaller on the residual stream (GPT-2).
  """

  def __init__(self, config: ModelConfig, context: int, rngs: nnx.Rngs):
    assert config.vocab_size, 'vocab_size comes from the tokenizer'
    self.config = config
    self.tokens = Embedding(config.table_rows, 'vocab', config, rngs)
    self.positions = Embedding(context, 'positions', config, rngs) if config.positions == 'learned' else None
    self.blocks: Block | nnx.List
    if config.scan:
      self.blocks = Block(config, rngs, stack=(config.layers,))
    else:
      self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
    self.norm = Norm(config.width, 'embed', config, rngs)
    self.head = None if config.tied else Linear(
      (config.width, config.table_rows), ('embed', 'vocab'), 0.02, dataclasses.replace(config, bias=False), rngs)

  def hidden(self, tokens: Int[Array, 'B T'], place: Place | None = None, cache: Cache | None = None,
             key: PRNGKeyArray | None = None) -> tuple[Float[Array, 'N D'], Cache | None]:
    """The normalized residual stream after the last layer, N = B * T.

    Args:
      tokens: ids.
      place: positions and segments; default: each row one document from position 0.
      cache: of an earlier part of the same sequences, from empty_cache(); place.filled says how much of it is valid.
      key: of dropout; None: no dropout.
    """
    b, t = tokens.shape
    if place is None:
      place = Place(jax.reshard(jnp.broadcast_to(jnp.arange(t), (b, t)), spec('batch', None)))
    flat = lambda ids: jax.lax.reshape(ids, (b * t,), out_sharding=spec('batch'))
    x = self.tokens(flat(tokens))
    if self.positions is not None:
      x = x + self.positions(flat(place.positions))
    x = dropout(x, self.config.dropout, None if key is None else jax.random.fold_in(key, self.config.layers))
    x, cache = self._layers(x, place, cache, key)
    return self.norm(x), cache

  def _layers(self, x, place, cache, key):
    graph, state = nnx.split(self.blocks if self.config.scan else self.blocks[0])

    def layer(x, inputs):
      index, state, cache = inputs
      layer_key = None if key is None else jax.random.fold_in(key, index)
      return nnx.merge(graph, state)(x, place, cache, layer_key)

    if self.config.remat != 'none':
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.config.remat == 'dots' else None
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=not self.config.scan)
    if self.config.scan:
      return jax.lax.scan(layer, x, (jnp.arange(self.config.layers), state, cache))
    caches = []
    for index, block in enumerate(self.blocks):
      part = None if cache is None else Cache(cache.keys[index], cache.values[index])
      x, part = layer(x, (index, nnx.split(block)[1], part))
      caches.append(part)
    return x, None if cache is None else jax.tree.map(lambda *parts: jnp.stack(parts), *caches)

  def logits(self, hidden: Float[Array, 'N D']) -> Float[Array, 'N V']:
    """float32 logits over the table's rows; those of padded ids, which no text has, are -1e30."""
    if self.head is None:
      logits = jnp.matmul(hidden, whole(self.tokens.table, self.config.compute_dtype).T, out_sharding=spec('batch', 'vocab'))
    else:
      logits = self.head(hidden)
    logits = logits.astype(jnp.float32)
    if self.config.vocab_size == self.config.table_rows:
      return logits
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1, out_sharding=spec('batch', 'vocab'))
    return jnp.where(ids < self.config.vocab_size, logits, -1e30)

  def __call__(self, tokens: Int[Array, 'B T'], place: Place | None = None,
               key: PRNGKeyArray | None = None) -> Float[Array, 'B T V']:
    """Logits of the next token at every position."""
    logits = self.logits(self.hidden(tokens, place, key=key)[0])
    return jax.lax.reshape(logits, (*tokens.shape, logits.shape[-1]), out_sharding=spec('batch', None, 'vocab'))


def empty_cache(config: ModelConfig, batch: int, size: int) -> Cache:
  """A cache for `size` tokens of `batch` sequences: [L, B, S, K, C] in the compute dtype."""
  shape = (config.layers, batch, size, config.key_heads, config.head_width)
  zeros = jnp.zeros(shape, config.compute_dtype, out_sharding=spec('layers', 'batch', None, 'heads', None))
  return Cache(zeros, zeros)

