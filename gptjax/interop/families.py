"""Published model families as configs of our one transformer, and the names of their tensors. A new family is a row of FAMILIES.

A family reads a Hugging Face config.json into a ModelConfig and writes one. A config.json that asks for something the transformer does
not support is an error that names the field.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

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
  """whether it is [out, in], where our kernel is [in, out]"""
  rows: bool = False
  """whether it has a row per token id; ours are padded to a multiple of model.vocab_multiple"""


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
  reader: Callable[['Fields'], tuple[ModelConfig, int]]
  """config.json to a config and the model's context length; see `read`"""
  write: Callable[[ModelConfig, int], Json]
  """the inverse; it may drop settings that this family does not have"""
  ignored: str = '$^'
  """pattern of tensors that hold no parameter"""
  prefix: str = ''
  """start of tensor names that some folders leave out"""

  def read(self, fields: 'Fields') -> tuple[ModelConfig, int]:
    """The config and context length that a config.json describes.

    Raises:
      UserError: a field is missing, has the wrong type, or asks for something that is not supported.
    """
    for name, values in self.required.items():
      fields.must(name, *values)
    return self.reader(fields)

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

  def __call__(self, name: str, default: Any = None, expected: str = 'a value; the field is missing',
               valid: Callable[[Any], bool] = lambda value: value is not None) -> Any:
    """A field; null counts as missing."""
    value = self.values.get(name)
    value = default if value is None else value
    if not valid(value):
      raise UserError(f'{self.file}: {name}', value, expected)
    return value

  def count(self, name: str, default: int | None = None) -> int:
    """A positive integer."""
    return self(name, default, 'an integer of at least 1', lambda value: type(value) is int and value >= 1)

  def number(self, name: str, default: float | None = None) -> float:
    """A number."""
    return float(self(name, default, 'a number', lambda value: type(value) in (int, float)))

  def flag(self, name: str, default: bool) -> bool:
    """A boolean."""
    return self(name, default, 'true or false', lambda value: type(value) is bool)

  def must(self, name: str, *expected: Any) -> Any:
    """A field of which only some values are supported; the first is the default."""
    return self(name, expected[0], ' or '.join(map(repr, expected)), lambda value: value in expected)

  def rope(self, original_context: int, theta: float = 10000.0) -> RopeConfig:
    """RoPE settings in the fields of transformers 5 (rope_parameters) or of earlier versions (rope_theta, rope_scaling)."""
    given = self('rope_parameters', {}) or {**self('rope_scaling', {}), 'rope_theta': self.number('rope_theta', theta)}
    local = 0.0
    if 'full_attention' in given:  # settings per kind of layer
      local = float(given['sliding_attention'].get('rope_theta', theta))
      if given['sliding_attention'].get('rope_type', 'default') != 'default':
        raise UserError(f'{self.file}: rope_parameters.sliding_attention', given['sliding_attention'], "rope_type 'default'")
      given = given['full_attention']
    elif 'rope_local_base_freq' in self.values:
      local = self.number('rope_local_base_freq')
    kind = given.get('rope_type', given.get('type', 'default'))
    if kind not in ('default', 'linear', 'llama3'):
      raise UserError(f'{self.file}: rope_type', kind, "'default', 'linear' or 'llama3'")
    if given.get('partial_rotary_factor', 1.0) != 1.0:
      raise UserError(f'{self.file}: partial_rotary_factor', given['partial_rotary_factor'], '1.0')
    base = float(given.get('rope_theta', theta))
    if kind == 'default':
      return RopeConfig(base, local)
    if kind == 'linear':
      return RopeConfig(base, local, 'linear', float(given['factor']))
    return RopeConfig(base, local, 'llama3', float(given['factor']), float(given['low_freq_factor']), float(given['high_freq_factor']),
                      int(given.get('original_max_position_embeddings', original_context)))


def parse_config(values: Json, file: str = 'config.json') -> tuple[Family, ModelConfig, int]:
  """Family, config and context length that a config.json of any content describes.

  Raises:
    UserError: the family or one of the settings is not supported, or a field has the wrong type.
  """
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
  """The first family that reproduces a config when it is written and read again.

  Raises:
    UserError: no family does.
  """
  wanted = comparable(config)
  nearest: tuple[int, str, list[str]] = (len(wanted), '', [])
  for one in FAMILIES.values():
    try:
      got = comparable(one.read(Fields(one.write(config, context)))[0])
    except UserError:
      continue
    differs = [name for name in wanted if wanted[name] != got.get(name)]  # a config without RoPE has no field `rope`
    if not differs:
      return one
    nearest = min(nearest, (len(differs), one.model_type, differs))
  _, name, differs = nearest
  raise UserError('model', ', '.join(f'{field}={wanted[field]}' for field in differs),
                  f'a model that a published family can describe; the nearest, {name}, differs in these fields')


_TRAINING_ONLY = ('vocab_multiple', 'dropout')
"""Fields of a model config that do not change the function it computes."""


def comparable(config: ModelConfig) -> Json:
  """The fields of a config that define the function it computes, with their defaults resolved."""
  values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in _TRAINING_ONLY}
  if config.positions != 'rope':
    del values['rope']
  values |= {'kv_heads': config.key_heads, 'mlp_width': config.hidden_width, 'head_size': config.head_width,
             'query_scale': config.query_scale or config.head_width, 'qkv_bias': config.qkv_bias or config.bias}
  return values


def _decoder(fields: Fields, **others: Any) -> tuple[ModelConfig, int]:
  """Reads the fields that all families since Llama share."""
  heads, width, context = fields.count('num_attention_heads'), fields.count('hidden_size'), fields.count('max_position_embeddings', 2048)
  common: Json = {
    'rope': fields.rope(context), 'norm': 'rmsnorm', 'norm_eps': fields.number('rms_norm_eps', 1e-6), 'mlp': 'swiglu', 'bias': False,
    'tied': fields.flag('tie_word_embeddings', False)}
  return ModelConfig(
    layers=fields.count('num_hidden_layers'), width=width, heads=heads, kv_heads=fields.count('num_key_value_heads', heads),
    head_size=fields.count('head_dim', width // heads), mlp_width=fields.count('intermediate_size'),
    vocab_size=fields.count('vocab_size'), positions='rope', **common | others), context


def _decoder_json(config: ModelConfig, context: int, **others: Any) -> Json:
  rope: Json = {'rope_type': 'default' if config.rope.scaling == 'none' else config.rope.scaling, 'rope_theta': config.rope.theta}
  if config.rope.scaling != 'none':
    rope['factor'] = config.rope.factor
  if config.rope.scaling == 'llama3':
    rope |= {'low_freq_factor': config.rope.low, 'high_freq_factor': config.rope.high,
             'original_max_position_embeddings': config.rope.original_context}
  return {
    'num_hidden_layers': config.layers, 'hidden_size': config.width, 'num_attention_heads': config.heads,
    'num_key_value_heads': config.key_heads, 'head_dim': config.head_width, 'intermediate_size': config.hidden_width,
    'vocab_size': config.vocab_size, 'max_position_embeddings': context, 'rms_norm_eps': config.norm_eps, 'rope_parameters': rope,
    'tie_word_embeddings': config.tied, 'hidden_act': 'silu'} | others


def _gpt2(fields: Fields) -> tuple[ModelConfig, int]:
  width = fields.count('n_embd', 768)
  return ModelConfig(
    layers=fields.count('n_layer', 12), width=width, heads=fields.count('n_head', 12), mlp_width=fields.count('n_inner', 4 * width),
    vocab_size=fields.count('vocab_size', 50257), norm_eps=fields.number('layer_norm_epsilon', 1e-5),
    tied=fields.flag('tie_word_embeddings', True)), fields.count('n_positions', 1024)


def _gpt2_json(config: ModelConfig, context: int) -> Json:
  return {'n_layer': config.layers, 'n_embd': config.width, 'n_head': config.heads, 'n_inner': config.hidden_width,
          'vocab_size': config.vocab_size, 'n_positions': context, 'layer_norm_epsilon': config.norm_eps,
          'tie_word_embeddings': config.tied, 'activation_function': 'gelu_new'}


def _mistral(fields: Fields) -> tuple[ModelConfig, int]:
  # A missing field means 4,096, the default of its class; null means no window.
  return _decoder(fields, window=fields.values.get('sliding_window', 4096) or 0)


def _mistral_json(config: ModelConfig, context: int) -> Json:
  return _decoder_json(config, context, sliding_window=config.window or None)


def _olmo2(fields: Fields) -> tuple[ModelConfig, int]:
  return _decoder(fields, norm_at='post', qk_norm='width', norm_eps=fields.number('rms_norm_eps', 1e-5))


def _pattern(fields: Fields, default: int) -> int:
  """global_every: from the list of layer types, or from the field that early Gemma 3 folders have instead."""
  layers = fields.count('num_hidden_layers')
  kinds = fields.values.get('layer_types')
  if kinds is None:
    return fields.count('sliding_window_pattern', default)
  every = kinds.index('full_attention') + 1 if 'full_attention' in kinds else 0
  if kinds != _kinds(layers, every):
    raise UserError(f'{fields.file}: layer_types', kinds, 'full_attention in every n-th layer and sliding_attention in the others')
  return every


def _kinds(layers: int, every: int) -> list[str]:
  return ['full_attention' if every and (layer + 1) % every == 0 else 'sliding_attention' for layer in range(layers)]


def _gemma(fields: Fields, every: int, **others: Any) -> tuple[ModelConfig, int]:
  return _decoder(
    fields, norm='rmsnorm1p', norm_at='sandwich', mlp='geglu', scaled_embedding=True, tied=fields.flag('tie_word_embeddings', True),
    window=fields.count('sliding_window', 4096), global_every=_pattern(fields, every),
    query_scale=fields.number('query_pre_attn_scalar', 256.0), **others)


def _gemma2(fields: Fields) -> tuple[ModelConfig, int]:
  return _gemma(fields, 2, attention_cap=float(fields.values.get('attn_logit_softcapping', 50.0) or 0),
                logit_cap=float(fields.values.get('final_logit_softcapping', 30.0) or 0))


def _gemma3(fields: Fields) -> tuple[ModelConfig, int]:
  rope = fields.rope(8192, 1e6)
  rope = dataclasses.replace(rope, local_theta=rope.local_theta or 10000.0)  # the default of its class
  return _gemma(fields, 6, qk_norm='head', rope=rope,
                attention_cap=float(fields.values.get('attn_logit_softcapping') or 0),
                logit_cap=float(fields.values.get('final_logit_softcapping') or 0))


def _gemma_json(config: ModelConfig, context: int) -> Json:
  values = _decoder_json(
    config, context, hidden_activation='gelu_pytorch_tanh', sliding_window=config.window or context,
    query_pre_attn_scalar=int(config.query_scale or config.head_width),  # its class requires an integer
    attn_logit_softcapping=config.attention_cap or None,
    final_logit_softcapping=config.logit_cap or None, layer_types=_kinds(config.layers, config.global_every))
  del values['hidden_act']
  return values


def _gemma3_json(config: ModelConfig, context: int) -> Json:
  values = _gemma_json(config, context)
  local = {'rope_type': 'default', 'rope_theta': config.rope.local_theta or config.rope.theta}
  return values | {'rope_parameters': {'full_attention': values['rope_parameters'], 'sliding_attention': local}}


_GPT2 = {
  'tokens/table': 'transformer.wte.weight', 'positions/table': 'transformer.wpe.weight',
  'norm/gain': 'transformer.ln_f.weight', 'norm/bias': 'transformer.ln_f.bias', 'lm_head/kernel': 'lm_head.weight',
  **{f'blocks/#/{ours}/{part}': f'transformer.h.#.{theirs}.{"bias" if part == "bias" else "weight"}' for ours, theirs, parts in (
    ('attention_norm', 'ln_1', ('gain', 'bias')), ('attention/q', 'attn.c_attn', ('kernel', 'bias')),
    ('attention/k', 'attn.c_attn', ('kernel', 'bias')), ('attention/v', 'attn.c_attn', ('kernel', 'bias')),
    ('attention/out', 'attn.c_proj', ('kernel', 'bias')), ('mlp_norm', 'ln_2', ('gain', 'bias')),
    ('mlp/up', 'mlp.c_fc', ('kernel', 'bias')), ('mlp/down', 'mlp.c_proj', ('kernel', 'bias'))) for part in parts},
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

_SILU = {'hidden_act': ('silu',)}
_NO_BIAS = {'attention_bias': (False,)}
_GEMMA = {'hidden_activation': ('gelu_pytorch_tanh',), **_NO_BIAS}
_QWEN = {**_SILU, 'use_sliding_window': (False,)}

FAMILIES = {one.model_type: one for one in (
  Family('gpt2', 'GPT2LMHeadModel', _GPT2, {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,)}, _gpt2, _gpt2_json, r'(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)', 'transformer.'),
  Family('llama', 'LlamaForCausalLM', _llama_names(_PRE), {**_SILU, **_NO_BIAS, 'mlp_bias': (False,)}, _decoder, _decoder_json,
         r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq'),
  Family('mistral', 'MistralForCausalLM', _llama_names(_PRE), _SILU, _mistral, _mistral_json),
  Family('qwen2', 'Qwen2ForCausalLM', _llama_names(_PRE, qkv_bias=True), _QWEN, functools.partial(_decoder, qkv_bias=True), _decoder_json),
  Family('qwen3', 'Qwen3ForCausalLM', _llama_names(_PRE, qk_norm=True), {**_QWEN, **_NO_BIAS},
         functools.partial(_decoder, qk_norm='head'), _decoder_json),
  Family('gemma2', 'Gemma2ForCausalLM', _llama_names(_SANDWICH), _GEMMA, _gemma2, _gemma_json),
  Family('gemma3_text', 'Gemma3ForCausalLM', _llama_names(_SANDWICH, qk_norm=True), {**_GEMMA, 'use_bidirectional_attention': (False,)},
         _gemma3, _gemma3_json),
  Family('olmo2', 'Olmo2ForCausalLM', _llama_names(_POST, qk_norm=True), {**_SILU, **_NO_BIAS}, _olmo2, _decoder_json),
)}
"""By model_type; an exported model becomes the first family that can describe it, so the simplest come first."""
