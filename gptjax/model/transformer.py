"""The decoder-only transformer: GPT-2's style and the modern one are configs of one class."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig
from gptjax.model.attention import Attention, Cache, Caches, Place
from gptjax.model.layers import Embedding, Linear, Norm, capped, dropout
from gptjax.model.loss import cross_entropy, log_probabilities
from gptjax.model.weights import Stack, product
from gptjax.sharding import Axis, spec


class MLP(nnx.Module):
  """The feed-forward layer: GELU between two matrices, or a gated one, SwiGLU or GEGLU (arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    wide, axes = (config.width, config.hidden_width), ('embed', ('mlp', config.hidden_width))
    self.up = Linear(wide, axes, 0.02, config, rngs, stack)
    self.gate = Linear(wide, axes, 0.02, config, rngs, stack) if config.gated else None
    self.activation = jax.nn.silu if config.mlp == 'swiglu' else jax.nn.gelu  # gelu's tanh approximation is jax's default
    self.down = Linear(wide[::-1], axes[::-1], 0.02 / math.sqrt(2 * config.layers), config, rngs, stack)

  def __call__(self, x: Float[Array, 'N D'], rows: Axis) -> Float[Array, 'N D']:
    up = checkpoint_name(self.up(x), 'up')
    hidden = self.activation(up) if self.gate is None else self.activation(checkpoint_name(self.gate(x), 'gate')) * up
    return self.down(checkpoint_name(hidden, 'hidden'), rows)


class Block(nnx.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x)); or the norms follow, x + norm(attention(x)), or do both."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    norm = lambda at: Norm(config.width, 'embed', config, rngs, stack) if config.norm_at in (at, 'sandwich') else None
    self.attention_norm = norm('pre')
    self.attention = Attention(config, rngs, stack)
    self.attention_post_norm = norm('post')
    self.mlp_norm = norm('pre')
    self.mlp = MLP(config, rngs, stack)
    self.mlp_post_norm = norm('post')
    self.dropout = config.dropout

  def __call__(self, x: Float[Array, 'N D'], layer: int | Int[Array, ''], place: Place, cache: Cache | None, key: PRNGKeyArray | None,
               rows: Axis) -> tuple[Float[Array, 'N D'], Cache | None]:
    normed = lambda norm, x: x if norm is None else norm(x)
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    x = checkpoint_name(x, 'block')
    y = checkpoint_name(normed(self.attention_norm, x), 'attention_norm')
    y, cache = self.attention(y, layer, place, cache, keys[0], rows)
    x = x + dropout(normed(self.attention_post_norm, checkpoint_name(y, 'attention_out')), self.dropout, keys[1])
    y = self.mlp(checkpoint_name(normed(self.mlp_norm, x), 'mlp_norm'), rows)
    return x + dropout(normed(self.mlp_post_norm, y), self.dropout, keys[2]), cache


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
    vocab = ('vocab', config.table_rows)
    self.tokens = Embedding(config.table_rows, vocab, config, rngs, config.scaled_embedding)
    self.positions = Embedding(context, 'positions', config, rngs) if config.positions == 'learned' else None
    self.blocks: Block | nnx.List
    if config.scan:
      self.blocks = Block(config, rngs, stack=(config.layers,))
    else:
      self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
    self.norm = Norm(config.width, 'embed', config, rngs)
    self.head = None if config.tied else Linear(
      (config.width, config.table_rows), ('embed', vocab), 0.02, dataclasses.replace(config, bias=False), rngs)

  def hidden(self, tokens: Int[Array, 'B T'], place: Place | None = None, cache: Caches | None = None,
             key: PRNGKeyArray | None = None) -> tuple[Float[Array, 'N D'], Caches | None]:
    """The normalized residual stream after the last layer, N = B * T.

    Args:
      tokens: ids.
      place: positions and segments; default: each row one document from position 0.
      cache: a fresh one, which takes up the keys and values of all tokens, or that of earlier tokens, with one more token a row.
        Only for layers that are not scanned.
      key: of dropout; None: no dropout.
    """
    b, t = tokens.shape
    if place is None:
      place = Place(jax.reshard(jnp.broadcast_to(jnp.arange(t), (b, t)), spec('batch', None)))
    flat = lambda ids: jax.lax.reshape(ids, (b * t,), out_sharding=spec('batch'))
    rows = 'tokens' if self.config.sequence_parallel and cache is None else 'batch'
    x = self.tokens(flat(tokens), rows)
    if self.positions is not None:
      x = x + self.positions(flat(place.positions), rows)
    x = dropout(x, self.config.dropout, None if key is None else jax.random.fold_in(key, self.config.layers))
    x, cache = self._layers(x, place, cache, key, rows)
    return self.norm(x), cache

  def _layers(self, x, place, cache, key, rows):
    scan = self.config.scan
    assert not (scan and cache is not None), 'a scan keeps no cache'
    graph, state = nnx.split(self.blocks if scan else self.blocks[0])

    def layer(index, x, state, cache):
      layer_key = None if key is None else jax.random.fold_in(key, index)
      return nnx.merge(graph, state)(x, index, place, cache, layer_key, rows)

    def recomputed(index, function):
      # The number of a layer that is not scanned is known when it is traced, and must stay so.
      function = functools.partial(function, index) if not scan else function
      return function if self.config.remat == 'none' else jax.checkpoint(function, policy=_kept(self.config), prevent_cse=not scan)

    if scan:
      run = recomputed(None, layer)
      return jax.lax.scan(lambda x, inputs: run(inputs[0], x, inputs[1], None), x, (jnp.arange(self.config.layers), state))
    caches = []
    for index, block in enumerate(self.blocks):
      x, kept = recomputed(index, layer)(x, nnx.split(block)[1], None if cache is None else cache[index])
      caches.append(kept)
    return x, None if cache is None else tuple(caches)

  def logits(self, hidden: Float[Array, 'N D']) -> Float[Array, 'N V']:
    """float32 logits over the table's rows; those of padded ids, which no text has, are -1e30."""
    logits = product(hidden, self.head_weight, 'batch', transposed=self.head is None).astype(jnp.float32)
    logits = capped(logits, self.config.logit_cap)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1, out_sharding=jax.typeof(logits).sharding.spec)
    return jnp.where(ids < self.config.vocab_size, logits, -1e30)

  def loss(self, hidden: Float[Array, 'N D'], targets: Int[Array, 'N'], mask: Float[Array, 'N'],
           z_loss: float = 0.0) -> tuple[Float[Array, ''], Float[Array, '']]:
    """As `cross_entropy`, of this model's head."""
    return cross_entropy(hidden, self.head_weight, targets, mask, self.config.vocab_size, z_loss, self.head is None,
                         self.config.logit_cap)

  def log_probabilities(self, hidden: Float[Array, 'N D'], targets: Int[Array, 'N']) -> tuple[Float[Array, 'N'], Bool[Array, 'N']]:
    """As `log_probabilities`, of this model's head."""
    return log_probabilities(hidden, self.head_weight, targets, self.config.vocab_size, self.head is None, self.config.logit_cap)

  @property
  def head_weight(self) -> nnx.Param:
    """[D, V], or the embedding table [V, D] where they are tied."""
    return self.tokens.table if self.head is None else self.head.kernel

  def __call__(self, tokens: Int[Array, 'B T'], place: Place | None = None,
               key: PRNGKeyArray | None = None) -> Float[Array, 'B T V']:
    """Logits of the next token at every position."""
    logits = self.logits(self.hidden(tokens, place, key=key)[0])
    return jax.lax.reshape(logits, (*tokens.shape, logits.shape[-1]), out_sharding=spec('batch', None, ('vocab', self.config.table_rows)))


def _kept(config: ModelConfig):
  """What of a block is kept for the backward pass; None: nothing but its input."""
  policies = jax.checkpoint_policies
  if config.remat == 'dots':
    return policies.save_only_these_names('q', 'k', 'v', 'attention_out', 'gate', 'up')
  if config.remat == 'names':
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=config.saved, names_which_can_be_offloaded=config.offloaded, offload_src='device',
      offload_dst='pinned_host')
  return None


def empty_cache(config: ModelConfig, batch: int, size: int) -> Caches:
  """A cache for `size` tokens of `batch` sequences, in the compute dtype; layers with a window keep no more than that."""
  def layer(index):
    kept = size if config.sees_all(index) else min(size, config.window)
    return jnp.zeros((batch, config.key_heads, kept, config.head_width), config.compute_dtype,
                     out_sharding=spec('batch', ('kv_heads', config.key_heads), None, None))
  return tuple(Cache(layer(index), layer(index)) for index in range(config.layers))

