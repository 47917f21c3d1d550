"""Attention kernels of particular devices, which run on each device's own sequences and heads, and the choice of an implementation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.config import ComputeConfig, ModelConfig, UserError
from gptjax.sharding import tensor_shard_map

LANES = 128
"""Splash attention works on blocks of this many tokens, or a multiple."""

MAX_FUSED = 8192
"""Tokens up to which splash attention computes all gradients in one kernel, whose temporaries grow with the square of the row."""


class ScoreConfig(NamedTuple):
  """How attention scores are computed from queries and keys."""

  scale: float
  """factor of their products"""
  cap: float = 0.0
  """scores s become cap * tanh(s / cap); 0: unchanged"""
  window: int = 0
  """tokens that a token attends to, itself included; 0: all before it"""


def attention_backend(config: ModelConfig, compute: ComputeConfig, context: int, platform: str | None = None) -> str:
  """compute.attention, 'auto' resolved, for a platform ('cpu', 'gpu', 'tpu'; default: this process's); a UserError if it cannot run."""
  platform = platform or jax.default_backend()
  can: dict[str, str] = {'blocks': '', 'xla': ''}  # why not
  no_dropout = '' if not config.dropout else f'no dropout, and model.dropout is {config.dropout}'
  if platform == 'tpu':
    can['splash'] = no_dropout or ('' if context % LANES == 0 else f'a context of a multiple of {LANES} (it is {context})')
  if platform == 'gpu':
    half = '' if compute.dtype == 'bfloat16' else f"bfloat16, and compute.dtype is '{compute.dtype}'"
    width = '' if config.head_width % 8 == 0 and config.head_width <= 128 else (
      f'heads of a multiple of 8 features, 128 at most, and they have {config.head_width}')
    even = '' if context % 2 == 0 else f'an even context (it is {context})'
    plain = '' if not config.attention_cap else f'scores without a cap, and model.attention_cap is {config.attention_cap}'
    can['cudnn'] = no_dropout or half or width or even or plain
  if compute.attention == 'auto':
    return next((name for name in ('splash', 'cudnn') if can.get(name) == ''), 'blocks')
  if compute.attention not in can:
    raise UserError('compute.attention', compute.attention, f'auto, {", ".join(can)} on a {platform}')
  if can[compute.attention]:
    raise UserError('compute.attention', compute.attention, f'auto, blocks or xla: it needs {can[compute.attention]}')
  return compute.attention


def _per_device(kernel: Callable, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'], v: Float[Array, 'B K T C'],
                segments: Int[Array, 'B T'] | None) -> Float[Array, 'B H T C']:
  heads = jax.typeof(q).sharding.spec
  run = tensor_shard_map(kernel, (heads, heads, heads, None if segments is None else PartitionSpec(None, None)), heads)
  return run(q, k, v, segments)


def splash(score: ScoreConfig, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'], v: Float[Array, 'B K T C'],
           segments: Int[Array, 'B T'] | None, interpret: bool = False) -> Float[Array, 'B H T C']:
  """Causal attention by Pallas kernels for TPUs that never hold the square of scores; `interpret`: run them on a CPU."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  length = q.shape[2]
  block = next(size for size in (1024, 512, 256, LANES) if length % size == 0)
  part = min(block, 512)  # keys at a time, so that a block's scores fit a core's memory
  # One kernel for all gradients computes scores once, but writes those of queries for each block of keys: for long rows, two kernels.
  fused = length <= MAX_FUSED
  sizes = kernels.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=part, block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=part,
    block_q_dq=None if fused else block, block_kv_dq=None if fused else part, use_fused_bwd_kernel=fused)

  def local(q, k, v, segments):
    seen = masks.LocalMask((length, length), (score.window - 1, 0), 0) if score.window else masks.CausalMask((length, length))
    run = kernels.make_splash_mha(masks.MultiHeadMask([seen] * q.shape[1]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                  attn_logits_soft_cap=score.cap or None, interpret=interpret)
    ids = None if segments is None else kernels.SegmentIds(segments, segments)
    return jax.vmap(run)(q * score.scale, k, v, ids).astype(v.dtype)

  return _per_device(local, q, k, v, segments)


def cudnn(score: ScoreConfig, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'], v: Float[Array, 'B K T C'],
          segments: Int[Array, 'B T'] | None) -> Float[Array, 'B H T C']:
  """Causal attention by NVIDIA's cuDNN, in bfloat16. Segments cost a mask of 2 bytes per pair of tokens, which all heads share."""
  def local(q, k, v, segments):
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    window = (score.window - 1, 0) if score.window else None
    out = jax.nn.dot_product_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), mask=mask, is_causal=True, scale=score.scale,
                                       local_window_size=window, implementation='cudnn')
    return jnp.swapaxes(out, 1, 2)

  return _per_device(local, q, k, v, segments)


KERNELS: dict[str, Callable] = {'splash': splash, 'cudnn': cudnn}
"""By their name in compute.attention."""
