"""What transformers makes of a config.json: python -m tests.acceptance.readings CONFIGS.json OUT.json, with any version of transformers.

A reading has the frequencies of the rotary positions and the window (0: none) of each layer, measured in a forward pass of a tiny model.
"""

import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]

TOKENS = 40
"""More than any window of these configs."""

_TINY = {'vocab_size': 16, 'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 4, 'num_attention_heads': 2,
         'num_key_value_heads': 2, 'max_position_embeddings': 64, 'head_dim': 8}
_LLAMA3 = {'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
_LINEAR = {'rope_type': 'linear', 'factor': 2.0}
_SCALING: list[Any] = [
  None, {}, 'linear', {'type': 'linear', 'factor': 4.0}, _LINEAR, {'rope_type': 'linear', 'factor': 2}, {'type': 'linear', **_LINEAR},
  {'type': 'dynamic', **_LINEAR}, {'factor': 4.0}, {'rope_type': 'default'}, {'rope_type': 'default', 'rope_theta': 5e4},
  {'rope_type': 'default', 'factor': 8.0}, {**_LINEAR, 'rope_theta': 5e4}, {'rope_theta': 5e4}, _LLAMA3,
  {name: value for name, value in _LLAMA3.items() if not name.startswith('original')}, {'type': 'yarn', 'factor': 4.0},
  {'rope_type': 'linear'}, {'rope_type': 'linear', 'factor': None}, {'rope_type': None}, {**_LINEAR, 'partial_rotary_factor': 0.5}]
_FULL, _LOCAL = {'rope_type': 'default', 'rope_theta': 3e4}, {'rope_type': 'default', 'rope_theta': 2e4}
_PARAMETERS: list[Any] = [
  None, {}, {'rope_type': 'default'}, _FULL, {'rope_type': 'default', 'rope_theta': 1e4}, {'rope_theta': 3e4}, _LINEAR,
  {**_LINEAR, 'rope_theta': 3e4}, {**_LLAMA3, 'rope_theta': 3e4}, {**_FULL, 'partial_rotary_factor': 0.5}, {'rope_theta': None}]
_NESTED: list[Any] = [
  {'full_attention': _FULL, 'sliding_attention': _LOCAL}, {'full_attention': {**_LINEAR, 'rope_theta': 3e4}, 'sliding_attention': _LOCAL},
  {'full_attention': _FULL}, {'full_attention': None, 'sliding_attention': _LOCAL}, {'full_attention': {'rope_type': 'default'}},
  {'full_attention': _FULL, 'sliding_attention': {**_LINEAR, 'rope_theta': 2e4}}]
_TOP: list[Json] = [
  {'rope_theta': 3e4}, {'rope_theta': 5e4}, {'rope_theta': 30000}, {'rope_theta': 1e4}, {'rope_theta': None}, {'rope_theta': '1e4'},
  {'partial_rotary_factor': 0.5}, {'partial_rotary_factor': 1.0}, {'original_max_position_embeddings': 16}, {'rope_local_base_freq': 2e4},
  {'rope_theta': 3e4, 'rope_local_base_freq': 5e3}, {'per_layer_config': {'1': {'rope_theta': 5.0}}}]
_S, _F = 'sliding_attention', 'full_attention'
_WINDOWS: list[Json] = [
  {'sliding_window': 7}, {'sliding_window': None}, {'sliding_window': 0}, {'sliding_window': 7, 'layer_types': [_S, _F, _S, _F]},
  {'sliding_window': 7, 'layer_types': [_F] * 4}, {'sliding_window': 7, 'layer_types': [_S] * 4},
  {'sliding_window': 7, 'layer_types': [_F, _S, _F, _S]}, {'sliding_window': 7, 'layer_types': [_S, _F]},
  {'sliding_window': None, 'layer_types': [_S, _F, _S, _F]}, {'sliding_window': 7, 'layer_types': None},
  {'sliding_window': 7, 'sliding_window_pattern': 2}, {'sliding_window': 7, 'sliding_window_pattern': 3, 'layer_types': [_S, _F, _S, _F]},
  {'sliding_window': 7, 'use_sliding_window': True, 'max_window_layers': 0},
  {'sliding_window': 7, 'use_sliding_window': True, 'max_window_layers': 2},
  {'sliding_window': 7, 'use_sliding_window': True, 'max_window_layers': 4}, {'sliding_window': 7, 'use_sliding_window': True},
  {'sliding_window': None, 'use_sliding_window': True, 'max_window_layers': 1},
  {'sliding_window': 7, 'use_sliding_window': True, 'layer_types': [_S, _S, _F, _S]},
  {'sliding_window': 7, 'use_sliding_window': False, 'layer_types': [_S, _F, _S, _F]}]


def cases(families: Mapping[str, str], count: int) -> list[Json]:
  """So many config.json of families, given as {model_type: architecture}, with settings of RoPE and windows in up to three places."""
  rng, found = random.Random(0), list[Json]()
  while len(found) < count:
    family = list(families)[len(found) % len(families)]
    values = {'model_type': family, 'architectures': [families[family]], **_TINY, 'sliding_window': 9}
    parameters = _PARAMETERS + (_NESTED if family == 'gemma3_text' else _NESTED[:1])
    wheres: list[tuple[str, list[Any]]] = [('rope_scaling', _SCALING), ('rope_parameters', parameters), ('', _TOP), ('', _WINDOWS)]
    for name, choices in rng.sample(wheres, rng.choice([1, 2, 2, 3])):
      value = rng.choice(choices)
      values |= {name: value} if name else value
    if values not in found:
      found.append(values)
  return found


def written(family: str) -> list[Json]:
  """config.json of exports of a family, with every kind of RoPE."""
  from gptjax.config import RopeConfig
  from gptjax.interop import FAMILIES, Fields
  kind = FAMILIES[family]
  model, context = kind.read(Fields({**_TINY, 'sliding_window': 7}))
  local = 2e4 if model.rope.local_theta else 0.0
  ropes = [RopeConfig(3e4, local), RopeConfig(3e4, local, 'linear', 4.0), RopeConfig(3e4, local, 'llama3', 4.0, original_context=32)]
  return [{'model_type': family, 'architectures': [kind.architecture], **kind.write(dataclasses.replace(model, rope=rope), context)}
          for rope in ropes]


def same(one: Json | str, other: Json | str) -> bool:
  """Whether two readings are equal, frequencies to 1e-6."""
  return isinstance(one, dict) and isinstance(other, dict) and one['windows'] == other['windows'] and np.allclose(
    one['frequencies'], other['frequencies'], 1e-6, 1e-7)


def newer(values: Json) -> bool:
  """Whether settings are where transformers 4 does not look, and need not agree."""
  return bool(values.get('rope_parameters')) or 'rope_theta' in (values.get('rope_scaling') or {})


def our_reading(values: Json) -> Json | str:
  """The same by gptjax, or its error."""
  from gptjax.config import UserError
  from gptjax.interop import parse_config
  from gptjax.model.attention import frequencies
  try:
    _, model, _ = parse_config(values)
  except UserError as error:
    return str(error)
  sees_all = [model.sees_all(layer) for layer in range(model.layers)]
  return {'frequencies': [frequencies(model.rope, model.head_width // 2, not one).tolist() for one in sees_all],
          'windows': [0 if one or model.window >= TOKENS else model.window for one in sees_all]}


def reading(values: Json) -> Json | str:
  """{'frequencies': [[...] per layer], 'windows': [int per layer]}, or the error of transformers."""
  import torch
  import transformers
  transformers.logging.set_verbosity_error()
  seen: list[tuple[list[float], int]] = []

  def watch(module, args, kwargs):
    cos, sin = (part[0, 1].double() for part in kwargs['position_embeddings'])
    visible = int((kwargs['attention_mask'][0, 0, -1] == 0).sum())
    turn = torch.atan2(sin, cos) * torch.hypot(sin, cos).round(decimals=5)
    seen.append((turn[:len(turn) // 2].tolist(), 0 if visible == TOKENS else visible))

  try:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
      Path(folder, 'config.json').write_text(json.dumps(values))
      config = transformers.AutoConfig.from_pretrained(folder)
      model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
      for name, module in model.named_modules():
        if name.endswith('self_attn'):
          module.register_forward_pre_hook(watch, with_kwargs=True)
      model(torch.arange(TOKENS)[None] % values['vocab_size'], use_cache=False)
  except Exception as error:  # of any kind: this asks what transformers does
    return f'{type(error).__name__}: {error}'
  return {'frequencies': [one for one, _ in seen], 'windows': [window for _, window in seen]}


if __name__ == '__main__':
  Path(sys.argv[2]).write_text(json.dumps([reading(values) for values in json.loads(Path(sys.argv[1]).read_text())]))
