"""The schema rejects invalid values with their valid ones, and has a help text for every field."""

import dataclasses

import pytest

from gptjax.config import (
    CheckpointConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeConfig, TokenizerConfig,
    UserError, duration_in_steps, schedule_warning)
from gptjax.config.flags import docstrings
from gptjax.training.optimizer import schedule

GROUPS = [
    Config, ModelConfig, RopeConfig, DataConfig, TokenizerConfig, OptimizerConfig, MeshConfig, EvalConfig, CheckpointConfig]


def in_steps(value):
  return duration_in_steps('steps', value, batch_size=8, context=64, rows_per_epoch=100)


@pytest.mark.parametrize('value, steps', [
    (0, 0), (2000, 2000), ('2000', 2000), ('2_000 steps', 2000), ('1 step', 1), ('1.5e3 steps', 1500),
    ('512 tokens', 1), ('513 tokens', 2), ('1e6tokens', 1954), ('1 epoch', 13), ('3 epochs', 38), ('2 Epochs', 25),
])
def test_durations_become_steps_rounded_up(value, steps):
  assert in_steps(value) == steps


@pytest.mark.parametrize('value', ['', 'soon', '-1', '1.5', '1.5 steps', '3 hours', '1_', '1e400', '9' * 5000, 'nan', '1e308 epochs'])
def test_an_invalid_duration_is_an_error_that_names_its_field(value):
  with pytest.raises(UserError, match='^steps: .*expected: '):
    in_steps(value)


@pytest.mark.parametrize('group, values, message', [
    (ModelConfig, {'layers': 0}, 'model.layers: 0, expected: 1 or more'),
    (ModelConfig, {'layers': 2**31}, 'model.layers: 2147483648, expected: 10000 or less'),
    (ModelConfig, {'window': 10**30}, 'model.window: 1000000000000000000000000000000, expected: 2147483647 or less'),
    (ModelConfig, {'width': 2**31 - 1, 'heads': 2}, 'model.heads: 2, expected: a divisor of model.width=2147483647: 1, 2147483647'),
    (DataConfig, {'workers': 10**6}, 'data.workers: 1000000, expected: 1000 or less'),
    (ModelConfig, {'width': 12, 'heads': 5}, 'model.heads: 5, expected: a divisor of model.width=12: 1, 2, 3, 4, 6'),
    (ModelConfig, {'heads': 4, 'kv_heads': 3}, 'model.kv_heads: 3, expected: a divisor of model.heads=4: 1, 2, 4'),
    (ModelConfig, {'width': 12, 'heads': 4, 'positions': 'rope'}, 'model.heads: 4, expected: an even '),
    (ModelConfig, {'dropout': 1.0}, 'model.dropout: 1.0, expected: at least 0 and below 1'),
    (RopeConfig, {'theta': 0.0}, 'model.rope.theta: 0.0, expected: a number above 0'),
    (RopeConfig, {'low': 4.0}, 'model.rope.high: 4.0, expected: a number above model.rope.low=4.0, which is above 0'),
    (ModelConfig, {'mup_base': 64, 'scaled_embedding': True}, 'model.scaled_embedding: True, expected: False with model.mup_base'),
    (ModelConfig, {'global_every': 2}, 'model.global_every: 2, expected: 0 unless model.window is set for the other layers'),
    (ModelConfig, {'head_size': 7, 'positions': 'rope'}, 'model.head_size: 7, expected: an even number for rope'),
    (TokenizerConfig, {'vocab_size': 10}, 'data.tokenizer.vocab_size: 10, expected: 300 or more'),
    (DataConfig, {'context': 0}, 'data.context: 0, expected: 1 or more'),
    (DataConfig, {'valid_fraction': 0.0}, 'data.valid_fraction: 0.0, expected: above 0 and below 1'),
    (OptimizerConfig, {'peak_lr': -1.0}, 'optimizer.peak_lr: -1.0, expected: 0 or more'),
    (OptimizerConfig, {'b2': 1.0}, 'optimizer.b2: 1.0, expected: at least 0 and below 1'),
    (OptimizerConfig, {'name': 'lion', 'b2': 0.0}, 'optimizer.b2: 0.0, expected: a number above 0 with optimizer.name=lion'),
    (OptimizerConfig, {'final_fraction': 2.0}, 'optimizer.final_fraction: 2.0, expected: 0 to 1'),
    (MeshConfig, {'data': 0}, 'mesh.data: 0, expected: 1 or more'),
    (MeshConfig, {'model': 0}, 'mesh.model: 0, expected: 1 or more'),
    (EvalConfig, {'rows': -1}, 'eval.rows: -1, expected: 0 or more'),
    (CheckpointConfig, {'keep': 0}, 'checkpoint.keep: 0, expected: 1 or more'),
    (Config, {'batch_size': 0}, 'batch_size: 0, expected: 1 or more'),
    (Config, {'batch_size': 6, 'microbatches': 4}, 'microbatches: 4, expected: a divisor of batch_size=6: 1, 2, 3, 6'),
    (Config, {'zero_stage': 7}, 'zero_stage: 7, expected: '),
    (Config, {'steps': 'soon'}, "steps: 'soon', expected: a count of steps"),
    (EvalConfig, {'every': 'often'}, "eval.every: 'often', expected: a count of steps"),
    (Config, {'optimizer': OptimizerConfig(decay=10)}, 'optimizer.decay: 10, expected: 0 unless '),
    (Config, {'checkpoint': CheckpointConfig(every=0, keep_every=10)}, 'checkpoint.keep_every: 10, expected: 0 unless '),
])
def test_invalid_values_are_errors(group, values, message):
  with pytest.raises(UserError) as caught:
    group(**values)
  assert str(caught.value).startswith(message)


@pytest.mark.parametrize('warmup, decay, words', [
    (99, 0, ''), (0, 100, ''), (60, 40, ''),
    (100, 0, 'optimizer.warmup is 100 steps, and the run ends after 100'),
    (60, 41, 'optimizer.decay begins at step 59, within the 60 of optimizer.warmup'),
])
def test_a_schedule_that_does_not_reach_its_peak_has_a_warning(warmup, decay, words):
  config = OptimizerConfig(schedule='wsd' if decay else 'cosine', warmup=warmup, decay=decay)
  durations = {'steps': 100, 'warmup': warmup, 'decay': decay}
  rates = [float(schedule(config, 1.0, **durations)(step)) for step in range(100)]
  found = schedule_warning(config, **durations)
  assert found.endswith(words) and bool(found) == bool(words) == (max(rates) < 1)


def test_zero_sizes_are_resolved():
  model = ModelConfig(width=96, heads=6, vocab_size=65, vocab_multiple=16)
  assert (model.head_width, model.key_heads, model.hidden_width, model.table_rows) == (16, 6, 384, 80)
  assert ModelConfig(kv_heads=2, mlp_width=100).key_heads == 2
  assert ModelConfig(mlp_width=100).hidden_width == 100


@pytest.mark.parametrize('group', GROUPS)
def test_every_field_is_frozen_and_has_a_help_text(group):
  fields = [field.name for field in dataclasses.fields(group)]
  lines = docstrings(group)
  assert list(lines) == fields
  assert all(line and '\n' not in line for line in lines.values())
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(group(), fields[0], None)


def test_an_error_is_one_line_and_suggests_the_nearest_name():
  error = UserError('data.files', 'a\nb', 'one of\n  these', ['abb', 'zzz'], given='abbb')
  assert str(error) == r"data.files: 'a\nb', expected: one of these; did you mean abb?"
  assert str(UserError('x', 1, 'y', {'abb': '--abb'}, 'ab')).endswith('did you mean --abb?')
  assert 'did you mean' not in str(UserError('x', 'far', 'y', ['off']))
