"""The fields of a config.json: their types, the settings of RoPE in every spelling, and the layers that have a window."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.config import ModelConfig, RopeConfig, UserError

Json = dict[str, Any]

_SCALINGS: dict[str, dict[str, str]] = {
  'default': {}, 'linear': {'factor': 'factor'},
  'llama3': {'factor': 'factor', 'low_freq_factor': 'low', 'high_freq_factor': 'high',
             'original_max_position_embeddings': 'original_context'}}
"""Our names of the fields that each kind of RoPE has."""
_KIND = ('rope_type', 'type')
"""Names of the field that selects the kind; earlier versions of transformers know only the second."""
_TOP = {name: name for name in ('rope_theta', 'partial_rotary_factor', 'original_max_position_embeddings')}
"""Settings of RoPE that may also be fields of config.json itself."""
_LAYERS = ('full_attention', 'sliding_attention')

_NO_EFFECT = frozenset({
  '_name_or_path', 'architectures', 'attention_dropout', 'attn_pdrop', 'bos_token_id', 'cache_implementation', 'dtype', 'embd_pdrop',
  'eos_token_id', 'id2label', 'initializer_range', 'label2id', 'model_type', 'n_ctx', 'output_attentions', 'output_hidden_states',
  'output_router_logits', 'pad_token_id', 'pretraining_tp', 'reorder_and_upcast_attn', 'resid_pdrop', 'return_dict',
  'router_aux_loss_coef', 'router_jitter_noise', 'summary_activation', 'summary_first_dropout', 'summary_proj_to_labels', 'summary_type',
  'summary_use_proj', 'task_specific_params', 'torch_dtype', 'transformers_version', 'use_cache'})
"""Fields that do not change the logits."""


class Fields:
  """The fields of a config.json, or of an object in it; every method raises a UserError that names the field."""

  def __init__(self, values: Json, file: str = 'config.json'):
    self.values, self.file = values, file
    self._read: dict[str, Fields | None] = {}

  def get(self, name: str, missing: Any = None) -> Any:
    """A field of any type."""
    self._read.setdefault(name)
    return self.values.get(name, missing)

  def typed(self, name: str, kind: type, missing: Any = None, nullable: bool = False) -> Any:
    """A positive int, a float or a bool. `missing` is the value without the field; None: it must be there. `nullable`: whether it may be
    null, which means 0; then 0 is no valid value."""
    value = self.get(name)
    if name not in self.values and missing is not None:
      return missing
    if value is None and nullable and name in self.values:
      return kind(0)
    if type(value) not in ((int, float) if kind is float else (kind,)) or not -sys.float_info.max <= value <= sys.float_info.max or (
        kind is int and value < 1) or (nullable and not value):
      expected = {int: 'an integer of at least 1', float: 'a number other than 0' if nullable else 'a number', bool: 'true or false'}[kind]
      raise self.error(name, value, expected + ' or null' * nullable)
    return kind(value)

  def inner(self, name: str) -> 'Fields':
    """The fields of an object; none if it is null or missing."""
    value = self.get(name)
    if value is not None and not isinstance(value, dict):
      raise self.error(name, value, 'an object or null')
    if (found := self._read[name]) is None:
      found = self._read[name] = Fields(value or {}, f'{self.file}: {name}')
    return found

  def unread(self) -> list[str]:
    """Names of the fields that were not read, without those that do not matter for a model's logits."""
    own = [name for name in self.values if name not in self._read and name not in _NO_EFFECT]
    return own + [f'{name}.{one}' for name, inner in self._read.items() if inner for one in inner.unread()]

  def error(self, name: str, value: object, expected: str) -> UserError:
    """The error for an invalid field."""
    return UserError(f'{self.file}: {name}', value, expected)

  def rope(self, context: int, theta: float = 10000.0) -> RopeConfig:
    """RoPE settings as transformers reads them: rope_scaling replaces rope_parameters, and fields of config.json itself complete it.
    `theta`: the family's default."""
    old, new = self.inner('rope_scaling'), self.inner('rope_parameters')
    for fields in (old, new):
      if nested := [name for name in _LAYERS if name in fields.values]:
        raise fields.error(nested[0], fields.values[nested[0]], 'settings for all layers: this family has no others')
    chosen = old if old.values else new
    return self._rope(chosen.values, {'rope_theta': theta, 'original_max_position_embeddings': context}, _TOP, chosen, old, new)

  def rope_by_layer(self, context: int) -> RopeConfig:
    """The same for Gemma 3: rope_parameters has an object for each kind of layer, and rope_scaling changes that of global layers."""
    old, new = self.inner('rope_scaling'), self.inner('rope_parameters')
    if flat := [name for name in new.values if name not in _LAYERS]:
      raise new.error(flat[0], new.values[flat[0]], f'{" and ".join(_LAYERS)}, each with its own settings')
    full, local = map(new.inner, _LAYERS)
    if old.values and new.values and not full.values:
      raise new.error('full_attention', None, 'the settings that rope_scaling changes')
    values = (full.values or {'rope_type': 'default'}) | old.values
    rope = self._rope(values, {'rope_theta': 1e6, 'original_max_position_embeddings': context}, {'rope_theta': 'rope_theta'},
                      old if old.values else full, old, full)
    sliding = self._rope(local.values, {'rope_theta': 10000.0}, {'rope_theta': 'rope_local_base_freq'}, local, local)
    if sliding.scaling != 'none':
      raise local.error('rope_type', sliding.scaling, "'default': local layers have no scaling")
    return dataclasses.replace(rope, local_theta=sliding.theta)

  def _rope(self, values: Json, defaults: Json, top: Mapping[str, str], chosen: 'Fields', *sources: 'Fields') -> RopeConfig:
    """The settings in `values`, completed by the fields of config.json that `top` names, and by `defaults`. Wherever else a setting is
    given it must be the same: `chosen` is the one of `sources` that transformers reads."""
    kind = values.get('rope_type', values.get('type', 'default'))
    if not isinstance(kind, str) or kind not in _SCALINGS:
      raise chosen.error('rope_type', kind, ' or '.join(map(repr, _SCALINGS)))
    if chosen.values.keys() - _TOP.keys() and not chosen.values.keys() & set(_KIND):
      raise chosen.error('rope_type', None, ' or '.join(map(repr, _SCALINGS)))
    types = {'rope_theta': float, 'partial_rotary_factor': float} | {
      theirs: type(getattr(RopeConfig, ours)) for theirs, ours in _SCALINGS[kind].items()}
    given = [(self, top[name], name) for name in types if top.get(name) in self.values] + [
      (source, name, name) for source in sources for name in (*_KIND, *types) if name in source.values]
    values = {'partial_rotary_factor': 1.0} | defaults | {name: self.values[key] for fields, key, name in given if fields is self} | values
    read = [fields.typed(key, types[name]) if name in types else fields.get(key) for fields, key, name in given]
    meant = {name: Fields(values, chosen.file).typed(name, types[name]) for name in types} | dict.fromkeys(_KIND, kind)
    for (fields, key, name), value in zip(given, read):
      if value != meant[name] and not (name in _KIND and value == 'default' and fields is not chosen):
        raise fields.error(key, value, f'{meant[name]!r}, the value that transformers reads: the settings of RoPE contradict each other')
    if meant['partial_rotary_factor'] != 1:
      raise chosen.error('partial_rotary_factor', meant['partial_rotary_factor'], '1.0')
    return RopeConfig(**{'theta': meant['rope_theta'], 'scaling': 'none' if kind == 'default' else kind} | {
      ours: meant[theirs] for theirs, ours in _SCALINGS[kind].items()})


def rope_values(config: ModelConfig, kind: str = 'rope_type') -> Json:
  """The inverse of `Fields.rope`, in fields that every version of transformers reads. `kind`: the name of the field for the kind."""
  rope = config.rope
  scaling = {theirs: getattr(rope, ours) for theirs, ours in _SCALINGS.get(rope.scaling, {}).items()}
  return {'rope_theta': rope.theta, 'rope_scaling': {kind: rope.scaling, **scaling} if scaling else None}


def read_windows(fields: Fields, layers: int, window: int, slides: Callable[[int], bool]) -> Json:
  """window and global_every, from layer_types or else `slides`, which tells whether a layer has a window of `window` tokens."""
  kinds = fields.get('layer_types')
  if kinds is None:
    kinds = [_LAYERS[slides(layer)] for layer in range(layers)]
  if kinds == ['full_attention'] * layers:
    return {'window': 0, 'global_every': 0}
  every = kinds.index('full_attention') + 1 if isinstance(kinds, list) and 'full_attention' in kinds else 0
  if kinds != [_LAYERS[not every or (layer + 1) % every != 0] for layer in range(layers)]:
    raise fields.error('layer_types', kinds, f'{layers} kinds: full_attention in every n-th layer and sliding_attention in the others')
  if not window:
    raise fields.error('layer_types', kinds, 'only full_attention, since the other fields give no window')
  return {'window': window, 'global_every': every}


def layer_types(config: ModelConfig) -> list[str]:
  """The kinds of all layers."""
  return [_LAYERS[not config.sees_all(layer)] for layer in range(config.layers)]
