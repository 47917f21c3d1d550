"""The decoder-only transformer: GPT-2's style and the modern one are configs of one class."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gptjax.config import TENSOR_AXIS, ComputeConfig, ModelConfig, entry
from gptjax.model.attention import Attention, Cache, Caches, Positions, positions_of
from gptjax.model.head import Head
from gptjax.model.experts import Experts, no_sums
from gptjax.model.layers import MLP, Embedding, Linear, Norm, Sums, dropout, fold
from gptjax.model.layout import Slots
from gptjax.model.weights import Stack, TokenAxis
from gptjax.sharding import divisible, spec


class Block(nnx.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x)); or the norms follow, x + norm(attention(x)), or do both.

  With `experts`, the feed-forward layer is a mixture of experts.
  """

  def __init__(self, config: ModelConfig, compute: ComputeConfig, stack: Stack = (), experts: bool = False):
    norm = lambda at: Norm(config.width, 'embed', config, compute, stack) if config.norm_at in (at, 'sandwich') else None
    self.attention_norm = norm('pre')
    self.attention = Attention(config, compute, stack)
    self.attention_post_norm = norm('post')
    self.mlp_norm = norm('pre')
    self.mlp = (Experts if experts else MLP)(config, compute, stack)
    self.mlp_post_norm = norm('post')
    self.config = config

  def __call__(self, x: Float[Array, 'N D'], layer: int | Int[Array, ''], positions: Positions, cache: Cache | None,
               keys: Key[Array, 'B'] | None, rows: TokenAxis) -> tuple[Float[Array, 'N D'], Cache | None, Sums]:
    """The residual stream after the layer, its part of the cache, and the sums that it adds to the objective's."""
    normed = lambda norm, x: x if norm is None else norm(x)
    x = checkpoint_name(x, 'block')
    y = checkpoint_name(normed(self.attention_norm, x), 'attention_norm')
    y, cache = self.attention(y, layer, positions, cache, fold(keys, 0), rows)
    rate = self.config.dropout
    x = x + dropout(normed(self.attention_post_norm, checkpoint_name(y, 'attention_out')), rate, fold(keys, 1))
    y = checkpoint_name(normed(self.mlp_norm, x), 'mlp_norm')
    y, sums = self.mlp(y, layer, positions.counted, rows) if isinstance(self.mlp, Experts) else (self.mlp(y, rows), no_sums(self.config))
    return x + dropout(normed(self.mlp_post_norm, y), rate, fold(keys, 2)), cache, sums


class Transformer(nnx.Module):
  """Token ids to hidden states, and a head for them. Its parameters have shapes only; `AbstractModel` gives them values.

  Initial values are normal with standard deviation 0.02, smaller on the residual stream (GPT-2). `context` limits learned positions;
  `slots`: those of stacked layers, if pipeline stages share them out.
  """

  def __init__(self, config: ModelConfig, compute: ComputeConfig, context: int, slots: Slots = ()):
    assert config.vocab_size, 'vocab_size comes from the tokenizer'
    self.config, self.compute, self.slots = config, compute, slots or tuple(range(config.layers))
    vocab = ('vocab', config.table_rows)
    self.tokens = Embedding(config.table_rows, config.width, vocab, compute, config.scaled_embedding)
    self.positions = Embedding(context, config.width, 'positions', compute) if config.positions == 'learned' else None
    block = lambda layer, stack=(): block_of(config)(config, compute, stack, config.has_experts(layer))
    self.is_stacked = compute.scan or bool(slots)
    self.blocks = block(config.layers - 1, (len(self.slots),)) if self.is_stacked else nnx.List(map(block, range(config.layers)))
    # By muP logits shrink as the width grows; gains that start lower are the same as a factor, and the function stays that of the family.
    self.norm = Norm(config.width, 'embed', config, compute, gain=1 / config.width_ratio)
    head = lambda axis: Linear((config.width, config.outputs), ('embed', axis), 0.02, compute)
    self.lm_head = None if config.tied or config.classes else head(vocab)
    self.classifier = head(None) if config.classes else None

  def hidden(self, tokens: Int[Array, 'B T'], positions: Positions | None = None, cache: Caches | None = None,
             keys: Key[Array, 'B'] | None = None) -> tuple[Float[Array, 'N D'], Caches | None, Sums]:
    """The normalized residual stream after the last layer, N = B * T; the cache with these tokens; and what layers add to the objective.

    Args:
      tokens: ids, of this device's rows and of its tokens in them.
      positions: positions and segments; default: each row is one document from position 0.
      cache: an empty one, or that of earlier tokens: for one more token per row, or for more if positions.cached has the tokens of each
        row. Only for layers that are not scanned.
      keys: for dropout, one per row; None: no dropout.
    """
    positions = positions or positions_of({'tokens': tokens})
    x = self.embed(tokens, positions, keys, cached=cache is not None)
    if self.is_stacked:
      assert cache is None, 'stacked layers keep no cache'
      x, sums = self.stacked_layers(x, jnp.array(self.slots), positions, keys)
    else:
      x, cache, sums = self._unstacked_layers(x, positions, cache, keys)
    return self.norm(x), cache, sums

  def embed(self, tokens: Int[Array, 'B T'], positions: Positions, keys: Key[Array, 'B'] | None,
            cached: bool = False) -> Float[Array, 'N D']:
    """The residual stream before the first layer."""
    rows = None if cached else self._token_axis
    x = self.tokens(tokens.reshape(-1), rows)
    if self.positions is not None:
      x = x + self.positions(positions.values.reshape(-1), rows)
    return dropout(x, self.config.dropout, fold(keys, self.config.layers))

  def stacked_layers(self, x: Float[Array, 'N D'], numbers: Int[Array, 'S'], positions: Positions,
                     keys: Key[Array, 'B'] | None) -> tuple[Float[Array, 'N D'], Sums]:
    """The residual stream after the layers with these numbers, which are stacked in this order, and the sums that they add; a place without
    a layer has a negative number."""
    graph, state = nnx.split(self.blocks)

    def run(number, x, state):
      x, _, sums = nnx.merge(graph, state)(x, number, positions, None, fold(keys, number), self._token_axis)
      return x, sums

    scan = self.compute.scan
    if self.compute.remat != 'none':
      run = jax.checkpoint(run, policy=_kept(self.compute), prevent_cse=not scan)

    def layer(x, inputs):
      if min(self.slots) >= 0:
        return run(inputs[0], x, inputs[1])
      nothing = jax.tree.map(lambda sum: jnp.zeros(sum.shape, sum.dtype), jax.eval_shape(run, inputs[0], x, inputs[1])[1])
      return jax.lax.cond(inputs[0] >= 0, run, lambda number, x, state: (x, nothing), inputs[0], x, inputs[1])

    if scan:
      x, sums = jax.lax.scan(layer, x, (numbers, state))
      return x, jax.tree.map(lambda values: values.sum(0), sums)
    sums = []
    for place in range(numbers.shape[0]):
      x, added = layer(x, jax.tree.map(lambda values: values[place], (numbers, state)))
      sums.append(added)
    return x, jax.tree.map(lambda *values: sum(values), *sums)

  def _unstacked_layers(self, x, positions, cache, keys):
    graphs, states = zip(*map(nnx.split, self.blocks))
    rows = None if cache is not None else self._token_axis

    def layer(index, x, state, cache):
      return nnx.merge(graphs[index], state)(x, index, positions, cache, fold(keys, index), rows)

    if self.compute.remat != 'none':  # the number of a layer is known when it is traced, and must stay so
      layer = jax.checkpoint(layer, policy=_kept(self.compute), static_argnums=0)
    caches, sums = [], []
    for index, state in enumerate(states):
      x, kept, added = layer(index, x, state, None if cache is None else cache[index])
      caches.append(kept)
      sums.append(added)
    return x, None if cache is None else tuple(caches), jax.tree.map(lambda *values: sum(values), *sums)

  @property
  def _token_axis(self) -> TokenAxis:
    return TENSOR_AXIS if self.compute.sequence_parallel else None

  @property
  def head(self) -> Head:
    """The output head, which reads hidden states."""
    if self.classifier is not None:
      return Head(self.classifier.kernel, False, self.config.classes)
    param = self.tokens.table if self.lm_head is None else self.lm_head.kernel
    return Head(param, self.lm_head is None, self.config.vocab_size, self.config.logit_cap)

  def __call__(self, tokens: Int[Array, 'B T'], positions: Positions | None = None) -> Float[Array, 'B T V']:
    """Logits of the next token, or of the classes, at every position."""
    logits = self.head.logits(self.hidden(tokens, positions)[0])
    return jax.lax.reshape(logits, (*tokens.shape, logits.shape[-1]), out_sharding=PartitionSpec(None, *jax.typeof(logits).sharding.spec))


def block_of(config: ModelConfig) -> type[Block]:
  """The class of the blocks; raises a UserError if there is none of this name."""
  return entry({'standard': Block}, 'model.block', config.block)


def _kept(compute: ComputeConfig):
  """The policy for the activations of a block that the backward pass keeps; None: only its input."""
  policies = jax.checkpoint_policies
  if compute.remat == 'dots':
    return policies.save_only_these_names(*compute.kept)
  if compute.remat == 'names':
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=compute.saved, names_which_can_be_offloaded=compute.offloaded, offload_src='device',
      offload_dst='pinned_host')
  return None


def empty_cache(config: ModelConfig, compute: ComputeConfig, batch: int, size: int, complete: bool = False) -> Caches:
  """A cache for `size` tokens of `batch` sequences, in the compute dtype; layers with a window keep no more than that, unless the cache is
  to be `complete`. Each device holds the key heads that its queries read."""
  heads = divisible('kv_heads', config.key_heads)
  def layer(index):
    kept = size if complete or config.sees_all(index) else min(size, config.window)
    return jnp.zeros((batch, heads, kept, config.head_width), compute.dtype, out_sharding=spec(None, ('kv_heads', heads), None, None))
  return tuple(Cache(layer(index), layer(index)) for index in range(config.layers))
