"""Published model families as configs of our one transformer, and the names of their tensors. A new family is a row of FAMILIES.

A family reads a Hugging Face config.json into a ModelConfig and writes one. A config.json that asks for something the transformer does
not support is an error that names the field.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config import ModelConfig, RouterConfig, UserError
from gptjax.interop.fields import Fields, Json, layer_types, read_windows, rope_values


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
  expert: int | None = None
  """the expert whose part of a parameter it is; None: it is no part of one"""


class Column(NamedTuple):
  """The field of a ModelConfig that a field of config.json sets."""

  ours: str
  """its name in ModelConfig, or 'context'"""
  missing: Any
  """its value if the field is missing: the default of the family's class in transformers, with 0 for null"""
  nullable: bool = False
  """whether null means 0; else null is invalid"""


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
  """fields of config.json of which we support some values only; the first is the default of the family's class"""
  columns: Mapping[str, Column]
  """fields of config.json that set one field of a ModelConfig"""
  settings: Json
  """fields of a ModelConfig that are equal in all models of the family"""
  read_more: Callable[[Fields, ModelConfig, int], Json] = lambda fields, model, context: _read_rope(fields, model, context)
  """fields of a ModelConfig that depend on several fields of config.json, given the others and the context length"""
  write_more: Callable[[ModelConfig, int], Json] = lambda config, context: rope_values(config)
  """the inverse of read_more"""
  prefix: str = ''
  """start of tensor names that some folders omit"""
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """other names of some columns"""
  experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """names in layers of experts, with @ for the expert's number, of parameters that `names` lacks or that have another name there"""

  def read(self, fields: Fields) -> tuple[ModelConfig, int]:
    """The config and context length that a config.json describes. Raises a UserError for a field that has the wrong type or an unsupported
    value, or contradicts another."""
    if layers := fields.get('per_layer_config'):
      raise fields.error('per_layer_config', layers, 'the same settings for all layers')
    for name, alias in self.aliases.items():
      if alias in fields.values:
        fields.values = {name: fields.get(alias)} | fields.values
        if fields.values[name] != fields.values[alias]:
          raise fields.error(alias, fields.values[alias], f'{fields.values[name]}, as in {name}')
    for name, values in self.required.items():
      if (value := fields.get(name, values[0])) not in values:
        raise fields.error(name, value, ' or '.join(map(repr, values)))
    found = {column.ours: fields.typed(name, type(getattr(ModelConfig, column.ours, 0)), column.missing, column.nullable)
             for name, column in self.columns.items()}
    context = found.pop('context')
    model = ModelConfig(**self.settings | found)
    return _resolved(dataclasses.replace(model, **self.read_more(fields, model, context))), context

  def write(self, config: ModelConfig, context: int) -> Json:
    """The config.json of a model, the inverse of `read`; it omits settings that this family does not have."""
    ours = {**vars(_resolved(config)), 'context': context}
    columns = {name: None if column.nullable and not ours[column.ours] else ours[column.ours] for name, column in self.columns.items()}
    return {name: values[0] for name, values in self.required.items()} | columns | self.write_more(config, context)

  def tensors(self, config: ModelConfig) -> list[Tensor]:
    """All tensors of a model."""
    found: dict[str, Tensor] = {}
    for ours in {**self.names, **self.experts}:
      if ours == 'lm_head/kernel' and config.tied:
        continue
      for layer in range(config.layers) if '#' in ours else (0,):
        names = self.experts if config.has_experts(layer) and ours in self.experts else self.names
        theirs, parameter = names.get(ours, '').replace('#', str(layer)), ours.replace('#', str(layer))
        for expert in range(config.experts) if '@' in theirs else (None,) * bool(theirs):
          name = theirs.replace('@', str(expert))
          earlier = found[name].parameters if name in found else ()
          # transformers' Linear is [out, in]; GPT-2's Conv1D is [in, out], as ours.
          transposed = ours.endswith('kernel') and (self.model_type != 'gpt2' or ours == 'lm_head/kernel')
          found[name] = Tensor(name, (*earlier, parameter), transposed, ours in ('tokens/table', 'lm_head/kernel'), expert)
    return list(found.values())


def parse_config(values: Json, file: str = 'config.json') -> tuple[Family, ModelConfig, int]:
  """Family, config and context length that a config.json of any content describes. Raises a UserError for an unsupported family or setting,
  or a field of the wrong type."""
  names, kind = values.get('architectures') or [], values.get('model_type')
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f'{file}: architectures', names, 'a list of names')
  family = FAMILIES.get(kind) if isinstance(kind, str) else None
  if family is None or (names and family.architecture not in names and not names[0].endswith(('Model', 'LMHeadModel'))):
    known = ', '.join(f'{one.model_type} ({one.architecture})' for one in FAMILIES.values())
    raise UserError(f'{file}: model_type', f'{kind} ({", ".join(names)})', known)
  return family, *family.read(Fields(values, file))


def ignored_fields(values: Json) -> list[str]:
  """Names of the fields of a valid config.json that neither `parse_config` nor transformers uses, but for those known to have no effect on
  logits."""
  fields = Fields(values)
  FAMILIES[values['model_type']].read(fields)
  return fields.unread()


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
  config = _resolved(config)
  values = {name: value for name, value in vars(config).items() if name not in ('vocab_multiple', 'dropout', 'mup_base')}
  values['router'] = dataclasses.replace(config.router, balance_loss=0.0, z_loss=0.0)
  if config.positions != 'rope':
    del values['rope']
  if not config.experts:
    del values['experts_per_token']
  return values | {'query_pre_attn_scalar': config.query_pre_attn_scalar or config.head_width, 'qkv_bias': config.qkv_bias or config.bias}


def _resolved(config: ModelConfig) -> ModelConfig:
  """The config with the sizes that 0 stands for."""
  hidden = config.hidden_width if config.expert_every > 1 or not config.experts else config.expert_features  # else no layer has the first
  return dataclasses.replace(config, kv_heads=config.key_heads, head_size=config.head_width, mlp_width=hidden,
                             expert_width=config.expert_features if config.experts else 0)


def _read_rope(fields: Fields, model: ModelConfig, context: int, slides: Callable[[int], bool] = lambda layer: False) -> Json:
  return {'rope': fields.rope(context)} | read_windows(fields, model.layers, model.window, slides)


def _read_mistral(fields: Fields, model: ModelConfig, context: int) -> Json:
  return _read_rope(fields, model, context, lambda layer: model.window > 0)


def _read_qwen(fields: Fields, model: ModelConfig, context: int) -> Json:
  first = fields.get('max_window_layers', 28)
  fields.get('sliding_window')  # known, whether it is used or not
  if type(first) is not int:
    raise fields.error('max_window_layers', first, 'a number of layers')
  window = fields.typed('sliding_window', int, 4096, True) if fields.typed('use_sliding_window', bool, False) else 0
  return _read_rope(fields, dataclasses.replace(model, window=window), context, lambda layer: window > 0 and layer >= first)


def _read_mixtral(fields: Fields, model: ModelConfig, context: int) -> Json:
  return {'rope': fields.rope(context, 1e6)}  # its class and that of Qwen3-MoE ignore layer_types: all layers have the window


def _read_qwen3_moe(fields: Fields, model: ModelConfig, context: int) -> Json:
  fields.get('sliding_window')  # known, whether it is used or not
  window = fields.typed('sliding_window', int, 4096, True) if fields.typed('use_sliding_window', bool, False) else 0
  return {'rope': fields.rope(context), 'window': window} | _read_norm_topk(fields)


def _write_qwen3_moe(config: ModelConfig, context: int) -> Json:
  window = {'use_sliding_window': config.window > 0, 'sliding_window': config.window or None}
  return rope_values(config) | window | {'norm_topk_prob': config.router.normalized}


def _read_norm_topk(fields: Fields) -> Json:
  return {'router': RouterConfig(normalized=fields.typed('norm_topk_prob', bool, False))}


def _read_gemma2(fields: Fields, model: ModelConfig, context: int) -> Json:
  return _read_rope(fields, model, context, lambda layer: layer % 2 == 0)


def _read_gemma3(fields: Fields, model: ModelConfig, context: int) -> Json:
  every = fields.typed('sliding_window_pattern', int, 6)  # early folders have no layer_types
  windows, by_pattern = (read_windows(given, model.layers, model.window, lambda layer: (layer + 1) % every != 0)
                         for given in (fields, Fields({})))
  if 'sliding_window_pattern' in fields.values and windows != by_pattern:
    raise fields.error('sliding_window_pattern', every, 'the same layers as layer_types')
  return {'rope': fields.rope_by_layer(context)} | windows


def _write_gemma(config: ModelConfig, context: int) -> Json:
  return rope_values(config) | {
    'sliding_window': config.window or context, 'layer_types': layer_types(config),
    'query_pre_attn_scalar': int(config.query_pre_attn_scalar or config.head_width)}  # its class requires an integer


def _write_gemma3(config: ModelConfig, context: int) -> Json:
  return _write_gemma(config, context) | {
    'rope_local_base_freq': config.rope.local_theta or config.rope.theta,
    'sliding_window_pattern': (config.global_every or config.layers + 1) if config.window else 1}


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


def _expert_names(router: str, experts: str, matrices: Mapping[str, str]) -> dict[str, str]:
  """Tensor names of the layers with experts."""
  return {'blocks/#/mlp/router/kernel': f'model.layers.#.{router}.weight',
          **{f'blocks/#/mlp/{ours}/kernel': f'model.layers.#.{experts}.@.{theirs}.weight' for ours, theirs in matrices.items()}}


_PRE = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
_POST = {'attention_post_norm': 'post_attention_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}
_SANDWICH = {'attention_norm': 'input_layernorm', 'attention_post_norm': 'post_attention_layernorm',
             'mlp_norm': 'pre_feedforward_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}

_GPT2_COLUMNS = {
  'n_layer': Column('layers', 12), 'n_embd': Column('width', 768), 'n_head': Column('heads', 12), 'n_inner': Column('mlp_width', 0, True),
  'vocab_size': Column('vocab_size', 50257), 'n_positions': Column('context', 1024), 'layer_norm_epsilon': Column('norm_eps', 1e-5),
  'tie_word_embeddings': Column('tied', True)}
_GPT2_ALIASES = {'n_layer': 'num_hidden_layers', 'n_embd': 'hidden_size', 'n_head': 'num_attention_heads',
                 'n_positions': 'max_position_embeddings'}
_LLAMA_COLUMNS = {
  'num_hidden_layers': Column('layers', 32), 'hidden_size': Column('width', 4096), 'num_attention_heads': Column('heads', 32),
  'num_key_value_heads': Column('kv_heads', 0, True), 'head_dim': Column('head_size', 0, True),
  'intermediate_size': Column('mlp_width', 11008), 'vocab_size': Column('vocab_size', 32000),
  'max_position_embeddings': Column('context', 2048), 'rms_norm_eps': Column('norm_eps', 1e-6),
  'tie_word_embeddings': Column('tied', False)}
_MISTRAL_COLUMNS = _LLAMA_COLUMNS | {
  'num_key_value_heads': Column('kv_heads', 8, True), 'intermediate_size': Column('mlp_width', 14336),
  'max_position_embeddings': Column('context', 131072), 'sliding_window': Column('window', 4096, True)}
_QWEN2_COLUMNS = _LLAMA_COLUMNS | {
  'num_key_value_heads': Column('kv_heads', 32, True), 'head_dim': Column('head_size', 0), 'intermediate_size': Column('mlp_width', 22016),
  'vocab_size': Column('vocab_size', 151936), 'max_position_embeddings': Column('context', 32768)}
_QWEN3_COLUMNS = _QWEN2_COLUMNS | {'head_dim': Column('head_size', 128)}
_OLMO2_COLUMNS = _LLAMA_COLUMNS | {
  'head_dim': Column('head_size', 0), 'vocab_size': Column('vocab_size', 50304), 'rms_norm_eps': Column('norm_eps', 1e-5)}
_GEMMA2_COLUMNS = _LLAMA_COLUMNS | {
  'num_hidden_layers': Column('layers', 26), 'hidden_size': Column('width', 2304), 'num_attention_heads': Column('heads', 8),
  'num_key_value_heads': Column('kv_heads', 4), 'head_dim': Column('head_size', 256), 'intermediate_size': Column('mlp_width', 9216),
  'vocab_size': Column('vocab_size', 256000), 'max_position_embeddings': Column('context', 8192),
  'tie_word_embeddings': Column('tied', True), 'sliding_window': Column('window', 4096),
  'query_pre_attn_scalar': Column('query_pre_attn_scalar', 256.0),
  'attn_logit_softcapping': Column('attention_cap', 50.0, True), 'final_logit_softcapping': Column('logit_cap', 30.0, True)}
_GEMMA3_COLUMNS = _GEMMA2_COLUMNS | {
  'vocab_size': Column('vocab_size', 262208), 'max_position_embeddings': Column('context', 131072),
  'attn_logit_softcapping': Column('attention_cap', 0.0, True), 'final_logit_softcapping': Column('logit_cap', 0.0, True)}

_MIXTRAL_COLUMNS = {name: column for name, column in _MISTRAL_COLUMNS.items() if name != 'intermediate_size'} | {
  'intermediate_size': Column('expert_width', 14336), 'rms_norm_eps': Column('norm_eps', 1e-5), 'sliding_window': Column('window', 0, True),
  'num_local_experts': Column('experts', 8), 'num_experts_per_tok': Column('experts_per_token', 2)}
_QWEN3_MOE_COLUMNS = _QWEN2_COLUMNS | {
  'num_hidden_layers': Column('layers', 24), 'hidden_size': Column('width', 2048), 'num_key_value_heads': Column('kv_heads', 4),
  'head_dim': Column('head_size', 0, True), 'intermediate_size': Column('mlp_width', 6144),
  'moe_intermediate_size': Column('expert_width', 768), 'num_experts': Column('experts', 128),
  'num_experts_per_tok': Column('experts_per_token', 8), 'decoder_sparse_step': Column('expert_every', 1)}
_OLMOE_COLUMNS = _OLMO2_COLUMNS | {
  'num_hidden_layers': Column('layers', 16), 'hidden_size': Column('width', 2048), 'num_attention_heads': Column('heads', 16),
  'intermediate_size': Column('expert_width', 2048), 'max_position_embeddings': Column('context', 4096),
  'num_experts': Column('experts', 64), 'num_experts_per_tok': Column('experts_per_token', 8)}
_EXPERT_ALIASES = {'num_experts': 'num_local_experts'}

_LLAMA = {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False}
_GEMMA = _LLAMA | {'norm': 'rmsnorm1p', 'norm_at': 'sandwich', 'mlp': 'geglu', 'scaled_embedding': True}

_SILU = {'hidden_act': ('silu',)}
_NO_BIAS = {'attention_bias': (False,)}
_QWEN_EXPERTS = _expert_names('mlp.gate', 'mlp.experts', {one: f'{one}_proj' for one in ('gate', 'up', 'down')})
_GELU = {'hidden_activation': ('gelu_pytorch_tanh',), **_NO_BIAS, 'use_bidirectional_attention': (False, None)}

FAMILIES = {one.model_type: one for one in (
  Family('gpt2', 'GPT2LMHeadModel', _GPT2, {
    'activation_function': ('gelu_new', 'gelu_pytorch_tanh'), 'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,)}, _GPT2_COLUMNS, {}, lambda fields, model, context: {}, lambda config, context: {},
    'transformer.', _GPT2_ALIASES),
  Family('llama', 'LlamaForCausalLM', _llama_names(_PRE), {**_SILU, **_NO_BIAS, 'mlp_bias': (False,)}, _LLAMA_COLUMNS, _LLAMA),
  Family('mistral', 'MistralForCausalLM', _llama_names(_PRE), _SILU, _MISTRAL_COLUMNS, _LLAMA, _read_mistral),
  Family('qwen2', 'Qwen2ForCausalLM', _llama_names(_PRE, qkv_bias=True), _SILU, _QWEN2_COLUMNS, _LLAMA | {'qkv_bias': True}, _read_qwen),
  Family('qwen3', 'Qwen3ForCausalLM', _llama_names(_PRE, qk_norm=True), {**_SILU, **_NO_BIAS}, _QWEN3_COLUMNS,
         _LLAMA | {'qk_norm': 'head'}, _read_qwen),
  Family('gemma2', 'Gemma2ForCausalLM', _llama_names(_SANDWICH), _GELU, _GEMMA2_COLUMNS, _GEMMA, _read_gemma2, _write_gemma),
  Family('gemma3_text', 'Gemma3ForCausalLM', _llama_names(_SANDWICH, qk_norm=True), _GELU, _GEMMA3_COLUMNS, _GEMMA | {'qk_norm': 'head'},
         _read_gemma3, _write_gemma3),
  Family('olmo2', 'Olmo2ForCausalLM', _llama_names(_POST, qk_norm=True), {**_SILU, **_NO_BIAS}, _OLMO2_COLUMNS,
         _LLAMA | {'norm_at': 'post', 'qk_norm': 'width'},
         # Its class in transformers 4 knows no other name of the kind.
         write_more=lambda config, context: rope_values(config, 'type')),
  Family('mixtral', 'MixtralForCausalLM', _llama_names(_PRE), _SILU, _MIXTRAL_COLUMNS, _LLAMA, _read_mixtral,
         aliases={'num_local_experts': 'num_experts'},
         experts=_expert_names('block_sparse_moe.gate', 'block_sparse_moe.experts', {'gate': 'w1', 'up': 'w3', 'down': 'w2'})),
  Family('qwen3_moe', 'Qwen3MoeForCausalLM', _llama_names(_PRE, qk_norm=True), {**_SILU, **_NO_BIAS, 'mlp_only_layers': ([], None)},
         _QWEN3_MOE_COLUMNS, _LLAMA | {'qk_norm': 'head'}, _read_qwen3_moe, _write_qwen3_moe,
         aliases=_EXPERT_ALIASES, experts=_QWEN_EXPERTS),
  Family('olmoe', 'OlmoeForCausalLM', _llama_names(_PRE, qk_norm=True), {**_SILU, **_NO_BIAS, 'clip_qkv': (None,)}, _OLMOE_COLUMNS,
         _LLAMA | {'qk_norm': 'width'}, lambda fields, model, context: _read_rope(fields, model, context) | _read_norm_topk(fields),
         lambda config, context: rope_values(config) | {'norm_topk_prob': config.router.normalized}, aliases=_EXPERT_ALIASES,
         experts=_QWEN_EXPERTS),
)}
"""Families by model_type; an exported model becomes the first family that can describe it, so the simplest come first."""
