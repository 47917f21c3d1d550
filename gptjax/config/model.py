"""The transformer of a run: its function, and separately how it is computed."""

import dataclasses
from typing import Annotated, Literal

from gptjax.config.checks import (
  FractionBelow1, Group, NonNegative, NonNegativeFloat, Positive, PositiveFloat, UserError, at_least, at_most, divisors)

Activation = Literal['block', 'attention_norm', 'q', 'k', 'v', 'attention', 'attention_out', 'mlp_norm', 'gate', 'up', 'hidden']
"""The activations of a block, in order: its input, the normalized input, queries, keys and values, the mixed values before and after
the output projection, the normalized input of the feed-forward layer, its two projections, and the activated hidden layer."""


@dataclasses.dataclass(frozen=True)
class RopeConfig(Group, prefix='model.rope.'):
  """Rotary position embeddings (RoPE, arXiv:2104.09864), and their scaling to contexts longer than those of their training."""

  theta: PositiveFloat = 10000.0
  """base of the wavelengths"""
  local_theta: NonNegativeFloat = 0.0
  """RoPE base of sliding-window layers, never scaled (Gemma 3); 0: theta, scaled as in the other layers"""
  scaling: Literal['none', 'linear', 'llama3'] = 'none'
  """linear: all wavelengths times factor (arXiv:2306.15595); llama3: only long ones (arXiv:2407.21783)"""
  factor: PositiveFloat = 1.0
  """factor by which the wavelengths grow"""
  low: float = 1.0
  """llama3: wavelengths with fewer periods than this in original_context are scaled by the full factor"""
  high: float = 4.0
  """llama3: wavelengths with more periods than this are not scaled; those in between are scaled in part"""
  original_context: Positive = 8192
  """llama3: context length, in tokens, before scaling"""

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.low < self.high:
      raise UserError('model.rope.high', self.high, f'a number above model.rope.low={self.low}, which is above 0')


@dataclasses.dataclass(frozen=True)
class RouterConfig(Group, prefix='model.router.'):
  """How a mixture-of-experts layer chooses and weighs the experts of a token."""

  score: Literal['softmax', 'sigmoid'] = 'softmax'
  """score of an expert, from its logit: softmax over all experts (arXiv:2101.03961), or sigmoid (arXiv:2412.19437)"""
  normalized: bool = True
  """weights of a token's experts: their scores divided by the sum of these scores; false: the scores themselves"""
  bias: bool = False
  """add a bias to the scores for the choice of experts alone, which every step moves by optimizer.balance_rate against the load \
(arXiv:2408.15664)"""
  balance_loss: NonNegativeFloat = 0.0
  """weight of the load-balancing loss (arXiv:2101.03961), computed over each row (arXiv:2412.19437, equation 17), of all layers"""
  z_loss: NonNegativeFloat = 0.0
  """weight of the squared log-normalizer of the router's logits (arXiv:2202.08906), of all layers"""


TRAINING_ONLY = ('model.dropout', 'model.mup_base', 'model.router.balance_loss', 'model.router.z_loss')
"""Fields that change how a model is trained, and not the function that its parameters stand for."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group, prefix='model.'):
  """The transformer: one field per choice in which GPT-2, modern models and published families differ."""

  layers: Annotated[int, at_least(1), at_most(10_000)] = 4  # more cannot be compiled
  """transformer blocks"""
  width: Positive = 128
  """size of the residual stream, in features"""
  heads: Positive = 4
  """query heads"""
  kv_heads: NonNegative = 0
  """key/value heads, each shared by heads/kv_heads query heads; 0: as many as heads"""
  head_size: NonNegative = 0
  """features per head; 0: width / heads, which must be an integer"""
  mlp_width: NonNegative = 0
  """hidden size of the feed-forward layer, in features; 0: 4 * width"""
  vocab_size: NonNegative = 0
  """token ids the model can read and predict; 0: as many as the tokenizer has"""
  vocab_multiple: Positive = 8
  """the embedding table is padded to a multiple of this many rows; padded ids are never predicted"""
  positions: Literal['learned', 'rope'] = 'learned'
  """learned: a table over positions (GPT-2); rope: rotary embeddings (arXiv:2104.09864)"""
  rope: RopeConfig = RopeConfig()
  """rotary positions"""
  norm: Literal['layernorm', 'rmsnorm', 'rmsnorm1p'] = 'layernorm'
  """layernorm (arXiv:1607.06450), rmsnorm (arXiv:1910.07467), or rmsnorm1p, whose gains are stored minus 1 (Gemma)"""
  norm_at: Literal['pre', 'post', 'sandwich'] = 'pre'
  """where a block normalizes: the inputs of attention and feed-forward layer (pre), their outputs (post, OLMo 2) or both (Gemma 2)"""
  norm_eps: NonNegativeFloat = 1e-5
  """added to the variance or mean square before the root"""
  mlp: Literal['gelu', 'swiglu', 'geglu'] = 'gelu'
  """gelu: two matrices, tanh approximation (GPT-2); swiglu, geglu: three, gated by silu or that gelu (arXiv:2002.05202)"""
  qk_norm: Literal['none', 'head', 'width'] = 'none'
  """normalize queries and keys per head (arXiv:2302.05442), or over all heads (OLMo 2)"""
  bias: bool = True
  """biases in linear layers and layernorms"""
  qkv_bias: bool = False
  """biases of queries, keys and values, where bias is off (Qwen 2)"""
  tied: bool = True
  """one table for the embedding and the output head"""
  scaled_embedding: bool = False
  """multiply embeddings by the root of width (arXiv:1706.03762, section 3.4)"""
  window: NonNegative = 0
  """tokens that a token attends to, itself included (sliding window, arXiv:2004.05150); 0: all before it"""
  global_every: NonNegative = 0
  """every n-th layer attends globally, without a window; 0: no layer does"""
  query_pre_attn_scalar: NonNegativeFloat = 0.0
  """attention scores are divided by its square root; 0: the head size (arXiv:1706.03762)"""
  attention_cap: NonNegativeFloat = 0.0
  """scores s become cap * tanh(s / cap) (Gemma 2, arXiv:2408.00118); 0: unchanged"""
  logit_cap: NonNegativeFloat = 0.0
  """the same cap for the output logits; 0: unchanged"""
  experts: NonNegative = 0
  """experts of a mixture-of-experts layer, which takes the place of the feed-forward layer; 0: none"""
  experts_per_token: Positive = 2
  """experts that process each token, those with the highest scores; every token is processed"""
  expert_width: NonNegative = 0
  """hidden size of an expert, in features; 0: that of the feed-forward layer"""
  shared_experts: NonNegative = 0
  """further experts that process every token, computed as one of their total width (arXiv:2401.06066)"""
  expert_every: Positive = 1
  """only every n-th layer has experts; the others have a feed-forward layer"""
  router: RouterConfig = RouterConfig()
  """choice of experts"""
  classes: NonNegative = 0
  """outputs of a head that classifies texts, in place of the head that predicts tokens; 0: as many as the data has classes, or no such \
head"""
  dropout: FractionBelow1 = 0.0
  """probability that a feature is dropped after embeddings, attention weights, attention and feed-forward"""
  mup_base: NonNegative = 0
  """width at which learning rates were chosen: initial values and AdamW's rates follow the maximal update parametrization (muP, \
arXiv:2203.03466), so that the rates suit model.width too; 0: standard parametrization"""
  block: Literal['standard'] | str = 'standard'
  """standard, or MODULE:NAME of your own subclass of gptjax.model.Block, as in examples/own_block.py"""

  def __post_init__(self):
    super().__post_init__()
    if not self.head_size and self.width % self.heads:
      raise UserError('model.heads', self.heads, f'a divisor of model.width={self.width}: {divisors(self.width)}')
    if self.kv_heads and self.heads % self.kv_heads:
      raise UserError('model.kv_heads', self.kv_heads, f'a divisor of model.heads={self.heads}: {divisors(self.heads)}')
    if self.positions == 'rope' and self.head_width % 2:
      if self.head_size:
        raise UserError('model.head_size', self.head_size, 'an even number for rope')
      raise UserError('model.heads', self.heads, f'an even model.width/model.heads for rope, not {self.head_width}')
    if self.global_every and not self.window:
      raise UserError('model.global_every', self.global_every, '0 unless model.window is set for the other layers')
    if self.mup_base and self.scaled_embedding:
      raise UserError('model.scaled_embedding', True, 'False with model.mup_base: by muP, embeddings do not grow with the width')
    self._check_experts()

  def _check_experts(self) -> None:
    if not self.experts:
      for name in ('expert_width', 'shared_experts', 'expert_every', 'router'):
        if (value := getattr(self, name)) != getattr(ModelConfig, name):
          raise UserError(f'model.{name}', value, 'its default unless model.experts is above 0')
    elif self.experts_per_token > self.experts:
      raise UserError('model.experts_per_token', self.experts_per_token, f'1 to model.experts={self.experts}')
    if self.expert_every > self.layers:
      raise UserError('model.expert_every', self.expert_every, f'1 to model.layers={self.layers}')

  def has_experts(self, layer: int) -> bool:
    """Whether a layer, counted from 0, is a mixture of experts."""
    return self.experts > 0 and (layer + 1) % self.expert_every == 0

  @property
  def expert_features(self) -> int:
    """Hidden size of an expert, with 0 resolved."""
    return self.expert_width or self.hidden_width

  @property
  def head_width(self) -> int:
    """Features of one attention head."""
    return self.head_size or self.width // self.heads

  @property
  def key_heads(self) -> int:
    """Key/value heads, with 0 resolved."""
    return self.kv_heads or self.heads

  def sees_all(self, layer: int) -> bool:
    """Whether a layer, counted from 0, has no window."""
    return not self.window or (self.global_every > 0 and (layer + 1) % self.global_every == 0)

  @property
  def hidden_width(self) -> int:
    """Feed-forward features, with 0 resolved."""
    return self.mlp_width or 4 * self.width

  @property
  def head_is_table(self) -> bool:
    """Whether the output head is the embedding table."""
    return self.tied and not self.classes

  @property
  def width_ratio(self) -> float:
    """The width relative to the base model of muP; 1 in standard parametrization."""
    return self.width / (self.mup_base or self.width)

  @property
  def outputs(self) -> int:
    """Columns of the output head: classes, or padded token ids."""
    return self.classes or self.table_rows

  @property
  def table_rows(self) -> int:
    """Rows of the embedding table: vocab_size rounded up to vocab_multiple."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How the transformer is computed; does not change the function, up to rounding, nor the meaning of a checkpoint or an export."""

  scan: bool = False
  """run the layers as one scan over stacked parameters: compile time does not grow with their number; slower on CPU"""
  remat: Literal['none', 'dots', 'full', 'names'] = 'none'
  """activations of a block that the backward pass recomputes: none, all but products with weights (dots), all (full), or all but \
those listed in compute.saved and compute.offloaded (names)"""
  saved: tuple[Activation, ...] = ()
  """activations kept under remat 'names'; JSON on a command line: '["attention", "hidden"]'"""
  offloaded: tuple[Activation, ...] = ()
  """activations kept in the host's memory under remat 'names'; for devices with a memory of their own"""
  sequence_parallel: bool = False
  """between matrix products, split activations by token over mesh.model (arXiv:2205.05198)"""
  attention: Literal['auto', 'blocks', 'xla', 'splash', 'cudnn'] = 'auto'
  """blocks: blockwise attention in JAX, on any device; xla: the full T x T score matrix; splash: fused kernels for TPUs; cudnn: \
NVIDIA's; auto: the fused kernel of the device if it supports the model, else blocks"""
  context_attention: Literal['ring', 'all_gather'] = 'ring'
  """with mesh.context: keys and values travel around a ring of devices while others are used, or all are gathered before attention"""
  experts: Literal['auto', 'blocks', 'ragged', 'megablox'] = 'auto'
  """products of experts; blocks: a loop over blocks of tokens, for CPUs; ragged: XLA's ragged products; megablox: those, and a Pallas \
kernel for gradients, for TPUs; auto: by the device"""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """precision of matrix products and activations; parameters, norms, softmax and loss stay float32"""

  def __post_init__(self):
    if self.remat != 'names' and (self.saved or self.offloaded):
      field = 'saved' if self.saved else 'offloaded'
      raise UserError(f'compute.{field}', list(getattr(self, field)), f"none unless compute.remat is 'names' (it is '{self.remat}')")
    if twice := set(self.saved) & set(self.offloaded):
      raise UserError('compute.offloaded', sorted(twice)[0], 'activations that are not in compute.saved')

  @property
  def kept(self) -> tuple[str, ...]:
    """The activations of a block that remat 'dots', 'full' or 'names' keeps besides its input, in either memory."""
    return ('q', 'k', 'v', 'attention_out', 'gate', 'up') if self.remat == 'dots' else (*self.saved, *self.offloaded)

  @property
  def plain(self) -> 'ComputeConfig':
    """The config for inference in the same dtype: layers one by one, nothing recomputed, attention by the device's backend."""
    return ComputeConfig(dtype=self.dtype)
