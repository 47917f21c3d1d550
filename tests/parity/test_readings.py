"""Every spelling of RoPE and windows in a config.json means what it means in transformers, or is an error."""

import pytest
from tiers import full

from gptjax.interop import FAMILIES, Fields
from gptjax.interop.families import ignored_fields
from tests.acceptance.readings import cases, newer, our_reading, reading, same, written

torch = transformers = None

LLAMA, *_ = cases({'llama': 'LlamaForCausalLM'}, 1)
PLAIN = {name: value for name, value in LLAMA.items() if not name.startswith(('rope', 'sliding', 'layer', 'max_window', 'use'))}
LINEAR, THETA = {'rope_type': 'linear', 'factor': 4.0}, {'rope_type': 'default', 'rope_theta': 5e5}
FULL, LOCAL = {**LINEAR, 'rope_theta': 3e4}, {'rope_type': 'default', 'rope_theta': 2e4}
KINDS = ['sliding_attention', 'full_attention'] * 2


def made(family, **fields):
  return PLAIN | {'model_type': family, 'architectures': [FAMILIES[family].architecture], **fields}


@pytest.mark.parametrize('values', [
  made('llama', rope_parameters={'rope_type': 'default'}, rope_theta=5e5),
  made('llama', rope_parameters=THETA, rope_theta=5e5),
  made('qwen2', rope_scaling={**LINEAR, 'rope_theta': 5e5}),
  made('qwen2', rope_parameters={'rope_type': 'default', 'rope_theta': 1e4}, rope_scaling=LINEAR),
  made('olmo2', rope_scaling={'type': 'linear', 'factor': 4.0}, rope_theta=5e5),
  made('mistral', rope_scaling={'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0},
       original_max_position_embeddings=16),
  made('mistral', sliding_window=7, layer_types=KINDS), made('mistral', sliding_window=7), made('mistral', sliding_window=None),
  made('qwen3', sliding_window=7, use_sliding_window=True, max_window_layers=4),
  made('qwen3', sliding_window=7, use_sliding_window=True, max_window_layers=0),
  made('qwen3', sliding_window=None, use_sliding_window=True, max_window_layers=0),
  made('mixtral', sliding_window=7, layer_types=KINDS), made('mixtral', sliding_window=None, layer_types=KINDS),
  made('qwen3_moe', sliding_window=7, use_sliding_window=True, layer_types=KINDS), made('qwen3_moe', sliding_window=7, layer_types=KINDS),
  made('gemma2', sliding_window=7, sliding_window_pattern=3),
  made('gemma3_text', sliding_window=7, sliding_window_pattern=3, rope_theta=5e5, rope_scaling=LINEAR),
  made('gemma3_text', sliding_window=7, layer_types=KINDS, rope_local_base_freq=5e3,
       rope_parameters={'full_attention': FULL, 'sliding_attention': {'rope_type': 'default'}})], ids=str)
def test_a_spelling_means_what_it_means_in_transformers(values):
  theirs = reading(values)
  assert isinstance(theirs, dict), theirs
  assert same(our_reading(values), theirs), our_reading(values)


@pytest.mark.parametrize('values, named', [
  (made('llama', rope_parameters=THETA, rope_theta=1e4), 'config.json: rope_theta: 10000.0, expected: 500000.0'),
  (made('llama', rope_parameters=THETA, rope_scaling=LINEAR), 'rope_parameters: rope_theta: 500000.0, expected: 10000.0'),
  (made('qwen2', rope_parameters=LINEAR, rope_scaling={'rope_type': 'default'}), "rope_parameters: rope_type: 'linear'"),
  (made('qwen2', rope_parameters=THETA, rope_scaling={'type': 'yarn', 'factor': 4.0}), "rope_scaling: rope_type: 'yarn'"),
  (made('llama', rope_scaling={**LINEAR, 'type': 'dynamic'}), "rope_scaling: type: 'dynamic', expected: 'linear'"),
  (made('llama', rope_scaling={'factor': 4.0}), 'rope_scaling: rope_type: None'),
  (made('llama', rope_scaling={'rope_type': 'linear'}), 'rope_scaling: factor: None, expected: a number'),
  (made('llama', rope_scaling={'rope_type': 'linear'}, rope_parameters=LINEAR), 'rope_scaling: factor: None, expected: a number'),
  (made('llama', rope_theta=None), 'config.json: rope_theta: None, expected: a number'),
  (made('llama', partial_rotary_factor=0.5), 'partial_rotary_factor: 0.5, expected: 1.0'),
  (made('qwen2', rope_parameters={'full_attention': FULL}), 'rope_parameters: full_attention'),
  (made('gemma3_text', rope_parameters=THETA), 'rope_parameters: rope_type'),
  (made('gemma3_text', rope_scaling={'type': 'linear', 'factor': 4.0}), "rope_scaling: type: 'linear', expected: 'default'"),
  (made('gemma3_text', rope_parameters={'sliding_attention': FULL}), 'sliding_attention: rope_type: .linear'),
  (made('gemma3_text', layer_types=KINDS, sliding_window_pattern=6), 'sliding_window_pattern: 6'),
  (made('mistral', sliding_window=None, layer_types=KINDS), 'layer_types: .*, expected: only full_attention'),
  (made('qwen3', sliding_window=7, layer_types=KINDS), 'layer_types: .*, expected: only full_attention'),
  (made('llama', layer_types=KINDS), 'layer_types'), (made('mistral', layer_types=KINDS[:2]), 'layer_types'),
  (made('qwen3', sliding_window=7, use_sliding_window=True, max_window_layers=2), 'layer_types: .*full_attention in every n-th layer'),
  (made('gemma2', attn_logit_softcapping=0.0), 'attn_logit_softcapping: 0.0, expected: a number other than 0 or null'),
  (made('qwen3', head_dim=None), 'head_dim: None, expected: an integer'),
  (made('llama', per_layer_config={'0': {}}), 'per_layer_config'),
  (made('gpt2', n_embd=24, hidden_size=16), 'hidden_size: 16, expected: 24')], ids=lambda one: one if isinstance(one, str) else None)
def test_a_config_that_contradicts_itself_is_an_error_that_names_the_field(values, named):
  with pytest.raises(ValueError, match=named):
    parsed(values)


def parsed(values):
  return FAMILIES[values['model_type']].read(Fields(values))


def test_fields_without_a_meaning_are_named():
  values = made('llama', other=1, sliding_window=None, use_cache=True, rope_scaling={**LINEAR, 'attention_factor': 2.0})
  assert ignored_fields(values) == ['other', 'sliding_window', 'rope_scaling.attention_factor']
  assert ignored_fields(made('qwen2', sliding_window=7, max_window_layers=2, rope_parameters=THETA)) == []
  assert ignored_fields(made('mixtral', layer_types=KINDS)) == ['layer_types']
  assert ignored_fields(made('mistral', attention_bias=True, layer_types=KINDS)) == ['attention_bias']


@pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'gpt2'])
def test_exports_mean_the_same_in_old_and_new_versions(family):
  for values in written(family):
    assert not newer(values) and 'rope_theta' in values  # where transformers 4 looks
    assert same(our_reading(values), reading(values))


@pytest.mark.parametrize('count', [full(210)])
def test_no_spelling_means_something_else_than_in_transformers(count):
  for values in cases({name: family.architecture for name, family in FAMILIES.items() if name != 'gpt2'}, count):
    ours = our_reading(values)
    assert isinstance(ours, str) or same(ours, reading(values)), values
