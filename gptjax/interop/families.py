"""Published model families as configs of our one transformer, and the names of their tensors. A new family is a row of FAMILIES.

A family reads a Hugging Face config.json into a ModelConfig and writes one. A config.json that asks for something the transformer does
not support is an error that names the field.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config import ModelConfig, RopeConfig, UserError

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a Hugging Face folder, and the parameters it is made of."""

  name: str
  """its name in the folder"""
  parameters: tuple[str, ...]
  """our names of its parts, which are concatenated along the last axis"""
  transposed: bool = False
  """whether it is [out, in]; our kernels are [in, out]"""
  rows: bool = False
  """whether it has a row per token id; ours are padded to a multiple of model.vocab_multiple"""


class Column(NamedTuple):
  """The field of a ModelConfig that a field of config.json sets."""

  ours: str
  """its name in ModelConfig, or 'context'"""
  missing: Any = None
  """its value if the field is missing; None: then the config.json is invalid"""
  nullable: bool = False
  """whether null means 0; else null counts as missing"""


_ROPE: dict[str, dict[str, str]] = {
  'default': {}, 'linear': {'factor': 'factor'},
  'llama3': {'factor': 'factor', 'low_freq_factor': 'low', 'high_freq_factor': 'high',
             'original_max_position_embeddings': 'original_context'}}
"""Our names of the fields that each kind of RoPE has."""


def _write_rope(config: ModelConfig, context: int) -> Json:
  kind = 'default' if config.rope.scaling == 'none' else config.rope.scaling
  scaling = {theirs: getattr(config.rope, ours) for theirs, ours in _ROPE[kind].items()}
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': config.rope.theta, **scaling}}


@dataclasses.dataclass(frozen=True)
class Family:
  """One published architecture."""

  model_type: str
  """its name in config.json"""
  architecture: str
  """the transformers class of its language model"""
  names: Mapping[str, str]
  """tensor name of each of our parameters, with # for the layer's number"""
  required: Mapping[str, tuple]
  """fields of config.json of which we support some values only; the first is the default"""
  columns: Mapping[str, Column]
  """fields of config.json that set one field of a ModelConfig"""
  settings: Json
  """fields of a ModelConfig that are equal in all models of the family"""
  read_more: Callable[['Fields', int], Json] = lambda fields, context: {'rope': fields.rope(context)}
  """fields of a ModelConfig that depend on several fields of config.json; the int is the model's context length"""
  write_more: Callable[[ModelConfig, int], Json] = _write_rope
  """the inverse of read_more"""
  ignored: str = '$^'
  """pattern of tensors that hold no parameter"""
  prefix: str = ''
  """start of tensor names that some folders omit"""

  def read(self, fields: 'Fields') -> tuple[ModelConfig, int]:
    """The config and context length that a config.json describes. Raises a UserError for a field that is missing, has the wrong type or an
    unsupported value."""
    for name, values in self.required.items():
      if (value := fields.values.get(name)) is not None and value not in values:
        raise fields.error(name, value, ' or '.join(map(repr, values)))
    found = {column.ours: fields.typed(name, type(getattr(ModelConfig, column.ours, 0)), column.missing, column.nullable)
             for name, column in self.columns.items()}
    context = found.pop('context')
    return _resolved(ModelConfig(**self.settings | found | self.read_more(fields, context))), context

  def write(self, config: ModelConfig, context: int) -> Json:
    """The config.json of a model, the inverse of `read`; it omits settings that this family does not have."""
    ours = {**vars(_resolved(config)), 'context': context}
    columns = {name: None if column.nullable and not ours[column.ours] else ours[column.ours] for name, column in self.columns.items()}
    return {name: values[0] for name, values in self.required.items()} | columns | self.write_more(config, context)

  def tensors(self, config: ModelConfig) -> list[Tensor]:
    """All tensors of a model."""
    found: dict[str, Tensor] = {}
    for ours, theirs in self.names.items():
      if ours == 'lm_head/kernel' and config.tied:
        continue
      for layer in range(config.layers) if '#' in ours else (0,):
        name, parameter = theirs.replace('#', str(layer)), ours.replace('#', str(layer))
        earlier = found[name].parameters if name in found else ()
        # transformers' Linear is [out, in]; GPT-2's Conv1D is [in, out], as ours.
        transposed = ours.endswith('kernel') and (self.model_type != 'gpt2' or ours == 'lm_head/kernel')
        found[name] = Tensor(name, (*earlier, parameter), transposed, ours in ('tokens/table', 'lm_head/kernel'))
    return list(found.values())


class Fields:
  """The fields of a config.json, with defaults and type checks; every method raises a UserError that names the field."""

  def __init__(self, values: Json, file: str = 'config.json'):
    self.values, self.file = values, file

  def typed(self, name: str, kind: type, missing: Any = None, nullable: bool = False) -> Any:
    """A positive int, a float or a bool; see Column."""
    value: Any = self.values.get(name)
    if value is None and nullable and name in self.values:
      return kind(0)
    if value is None and missing is not None:
      return missing
    if type(value) not in ((int, float) if kind is float else (kind,)) or (kind is int and value < 1):
      raise self.error(name, value, {int: 'an integer of at least 1', float: 'a number', bool: 'true or false'}[kind])
    return kind(value)

  def error(self, name: str, value: object, expected: str) -> UserError:
    """The error for an invalid field."""
    return UserError(f'{self.file}: {name}', value, expected)

  def rope(self, context: int, theta: float = 10000.0) -> RopeConfig:
    """RoPE settings in the fields of transformers 5 (rope_parameters) or of earlier versions (rope_theta, rope_scaling)."""
    given = self.values.get('rope_parameters') or {
      **(self.values.get('rope_scaling') or {}), 'rope_theta': self.typed('rope_theta', float, theta)}
    local = 0.0
    if 'full_attention' in given:  # settings per kind of layer
      local = float(given['sliding_attention'].get('rope_theta', theta))
      if given['sliding_attention'].get('rope_type', 'default') != 'default':
        raise self.error('rope_parameters.sliding_attention', given['sliding_attention'], "rope_type 'default'")
      given = given['full_attention']
    elif 'rope_local_base_freq' in self.values:
      local = self.typed('rope_local_base_freq', float)
    kind = given.get('rope_type', given.get('type', 'default'))
    if kind not in _ROPE:
      raise self.error('rope_type', kind, ' or '.join(map(repr, _ROPE)))
    if given.get('partial_rotary_factor', 1.0) != 1.0:
      raise self.error('partial_rotary_factor', given['partial_rotary_factor'], '1.0')
    given = {'original_max_position_embeddings': context} | given
    scaling = {ours: type(getattr(RopeConfig, ours))(given[theirs]) for theirs, ours in _ROPE[kind].items()}
    return RopeConfig(float(given.get('rope_theta', theta)), local, 'none' if kind == 'default' else kind, **scaling)


def parse_config(values: Json, file: str = 'config.json') -> tuple[Family, ModelConfig, int]:
  """Family, config and context length that a config.json of any content describes. Raises a UserError for an unsupported family or setting,
  or a field of the wrong type."""
  try:
    names = values.get('architectures') or []
    family = FAMILIES.get(values.get('model_type', ''))
    if family is None or (names and family.architecture not in names and not names[0].endswith(('Model', 'LMHeadModel'))):
      known = ', '.join(f'{one.model_type} ({one.architecture})' for one in FAMILIES.values())
      raise UserError(f'{file}: model_type', f'{values.get("model_type")} ({", ".join(names)})', known)
    return family, *family.read(Fields(values, file))
  except UserError:
    raise
  except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
    raise UserError(file, f'{type(error).__name__}: {error}', 'a config.json whose fields have the types of its family') from None


def family_for(config: ModelConfig, context: int) -> Family:
  """The first family that reproduces a config when it is written and read again. Raises a UserError for a config that no family
  reproduces."""
  wanted = comparable(config)
  differs: dict[str, list[str]] = {}
  for one in FAMILIES.values():
    try:
      got = comparable(one.read(Fields(one.write(config, context)))[0])
    except UserError:
      continue
    differs[one.model_type] = [name for name in wanted if wanted[name] != got.get(name)]  # a config without RoPE has no field `rope`
  nearest = min(differs, key=lambda name: len(differs[name]))
  if not differs[nearest]:
    return FAMILIES[nearest]
  raise UserError('model', ', '.join(f'{field}={wanted[field]}' for field in differs[nearest]),
                  f'a model that a published family can describe; the nearest, {nearest}, differs in these fields')


def comparable(config: ModelConfig) -> Json:
  """The fields of a config that define the function it computes, with their defaults resolved."""
  values = {name: value for name, value in vars(_resolved(config)).items() if name not in ('vocab_multiple', 'dropout')}
  if config.positions != 'rope':
    del values['rope']
  return values | {'query_pre_attn_scalar': config.query_pre_attn_scalar or config.head_width, 'qkv_bias': config.qkv_bias or config.bias}


def _resolved(config: ModelConfig) -> ModelConfig:
  """The config with the sizes that 0 stands for."""
  return dataclasses.replace(config, kv_heads=config.key_heads, head_size=config.head_width, mlp_width=config.hidden_width)


def _read_pattern(fields: Fields, default: int) -> Json:
  """global_every: from the list of layer types, or from the field that early Gemma 3 folders have instead."""
  kinds = fields.values.get('layer_types')
  if kinds is None:
    return {'global_every': fields.typed('sliding_window_pattern', int, default)}
  every = kinds.index('full_attention') + 1 if 'full_attention' in kinds else 0
  if kinds != _layer_types(fields.typed('num_hidden_layers', int), every):
    raise fields.error('layer_types', kinds, 'full_attention in every n-th layer and sliding_attention in the others')
  return {'global_every': every}


def _layer_types(layers: int, every: int) -> list[str]:
  return ['full_attention' if every and (layer + 1) % every == 0 else 'sliding_attention' for layer in range(layers)]


def _read_gemma3(fields: Fields, context: int) -> Json:
  rope = fields.rope(8192, 1e6)
  rope = dataclasses.replace(rope, local_theta=rope.local_theta or 10000.0)  # the default of its class
  return {'rope': rope, **_read_pattern(fields, 6)}


def _write_gemma(config: ModelConfig, context: int) -> Json:
  return _write_rope(config, context) | {
    'sliding_window': config.window or context, 'layer_types': _layer_types(config.layers, config.global_every),
    'query_pre_attn_scalar': int(config.query_pre_attn_scalar or config.head_width)}  # its class requires an integer


def _write_gemma3(config: ModelConfig, context: int) -> Json:
  values = _write_gemma(config, context)
  local = {'rope_type': 'default', 'rope_theta': config.rope.local_theta or config.rope.theta}
  return values | {'rope_parameters': {'full_attention': values['rope_parameters'], 'sliding_attention': local}}


_GPT2_LAYER = {'attention_norm': 'ln_1', 'attention/q': 'attn.c_attn', 'attention/k': 'attn.c_attn', 'attention/v': 'attn.c_attn',
               'attention/out': 'attn.c_proj', 'mlp_norm': 'ln_2', 'mlp/up': 'mlp.c_fc', 'mlp/down': 'mlp.c_proj'}
_GPT2 = {
  'tokens/table': 'transformer.wte.weight', 'positions/table': 'transformer.wpe.weight',
  'norm/gain': 'transformer.ln_f.weight', 'norm/bias': 'transformer.ln_f.bias', 'lm_head/kernel': 'lm_head.weight',
  **{f'blocks/#/{ours}/{part}': f'transformer.h.#.{theirs}.{"bias" if part == "bias" else "weight"}'
     for ours, theirs in _GPT2_LAYER.items() for part in ('gain' if ours.endswith('norm') else 'kernel', 'bias')},
}


def _llama_names(norms: Mapping[str, str], qk_norm: bool = False, qkv_bias: bool = False) -> dict[str, str]:
  """Tensor names of the families since Llama, which differ in the names of their norms."""
  names = {'tokens/table': 'model.embed_tokens.weight', 'norm/gain': 'model.norm.weight', 'lm_head/kernel': 'lm_head.weight'}
  layer = {
    **{f'attention/{one}/kernel': f'self_attn.{one}_proj.weight' for one in 'qkv'}, 'attention/out/kernel': 'self_attn.o_proj.weight',
    **{f'mlp/{one}/kernel': f'mlp.{one}_proj.weight' for one in ('gate', 'up', 'down')},
    **{f'{ours}/gain': f'{theirs}.weight' for ours, theirs in norms.items()}}
  if qk_norm:
    layer |= {f'attention/{one}_norm/gain': f'self_attn.{one}_norm.weight' for one in 'qk'}
  if qkv_bias:
    layer |= {f'attention/{one}/bias': f'self_attn.{one}_proj.bias' for one in 'qkv'}
  return names | {f'blocks/#/{ours}': f'model.layers.#.{theirs}' for ours, theirs in layer.items()}


_PRE = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
_POST = {'attention_post_norm': 'post_attention_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}
_SANDWICH = {'attention_norm': 'input_layernorm', 'attention_post_norm': 'post_attention_layernorm',
             'mlp_norm': 'pre_feedforward_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}

_GPT2_COLUMNS = {
  'n_layer': Column('layers', 12), 'n_embd': Column('width', 768), 'n_head': Column('heads', 12), 'n_inner': Column('mlp_width', 0),
  'vocab_size': Column('vocab_size', 50257), 'n_positions': Column('context', 1024), 'layer_norm_epsilon': Column('norm_eps', 1e-5),
  'tie_word_embeddings': Column('tied', True)}
_LLAMA_COLUMNS = {
  'num_hidden_layers': Column('layers'), 'hidden_size': Column('width'), 'num_attention_heads': Column('heads'),
  'num_key_value_heads': Column('kv_heads', 0), 'head_dim': Column('head_size', 0), 'intermediate_size': Column('mlp_width'),
  'vocab_size': Column('vocab_size'), 'max_position_embeddings': Column('context', 2048), 'rms_norm_eps': Column('norm_eps', 1e-6),
  'tie_word_embeddings': Column('tied', False)}
_GEMMA_COLUMNS = _LLAMA_COLUMNS | {
  'tie_word_embeddings': Column('tied', True), 'sliding_window': Column('window', 4096),
  'query_pre_attn_scalar': Column('query_pre_attn_scalar', 256.0),
  'attn_logit_softcapping': Column('attention_cap', 0.0, True), 'final_logit_softcapping': Column('logit_cap', 0.0, True)}
_GEMMA2_COLUMNS = _GEMMA_COLUMNS | {
  'attn_logit_softcapping': Column('attention_cap', 50.0, True), 'final_logit_softcapping': Column('logit_cap', 30.0, True)}

_LLAMA = {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False}
_GEMMA = _LLAMA | {'norm': 'rmsnorm1p', 'norm_at': 'sandwich', 'mlp': 'geglu', 'scaled_embedding': True}

_SILU = {'hidden_act': ('silu',)}
_NO_BIAS = {'attention_bias': (False,)}
_GELU = {'hidden_activation': ('gelu_pytorch_tanh',), **_NO_BIAS}
_QWEN = {**_SILU, 'use_sliding_window': (False,)}

FAMILIES = {one.model_type: one for one in (
  Family('gpt2', 'GPT2LMHeadModel', _GPT2, {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,)}, _GPT2_COLUMNS, {}, lambda fields, context: {}, lambda config, context: {},
    r'(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)', 'transformer.'),
  Family('llama', 'LlamaForCausalLM', _llama_names(_PRE), {**_SILU, **_NO_BIAS, 'mlp_bias': (False,)}, _LLAMA_COLUMNS, _LLAMA,
         ignored=r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq'),
  Family('mistral', 'MistralForCausalLM', _llama_names(_PRE), _SILU,
         _LLAMA_COLUMNS | {'sliding_window': Column('window', 4096, True)}, _LLAMA),
  Family('qwen2', 'Qwen2ForCausalLM', _llama_names(_PRE, qkv_bias=True), _QWEN, _LLAMA_COLUMNS, _LLAMA | {'qkv_bias': True}),
  Family('qwen3', 'Qwen3ForCausalLM', _llama_names(_PRE, qk_norm=True), {**_QWEN, **_NO_BIAS}, _LLAMA_COLUMNS,
         _LLAMA | {'qk_norm': 'head'}),
  Family('gemma2', 'Gemma2ForCausalLM', _llama_names(_SANDWICH), _GELU, _GEMMA2_COLUMNS, _GEMMA,
         lambda fields, context: {'rope': fields.rope(context)} | _read_pattern(fields, 2), _write_gemma),
  Family('gemma3_text', 'Gemma3ForCausalLM', _llama_names(_SANDWICH, qk_norm=True), {**_GELU, 'use_bidirectional_attention': (False,)},
         _GEMMA_COLUMNS, _GEMMA | {'qk_norm': 'head'}, _read_gemma3, _write_gemma3),
  Family('olmo2', 'Olmo2ForCausalLM', _llama_names(_POST, qk_norm=True), {**_SILU, **_NO_BIAS},
         _LLAMA_COLUMNS | {'rms_norm_eps': Column('norm_eps', 1e-5)}, _LLAMA | {'norm_at': 'post', 'qk_norm': 'width'}),
)}
"""Families by model_type; an exported model becomes the first family that can describe it, so the simplest come first."""
