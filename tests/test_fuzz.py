"""The robustness bar with few cases: mutated configs and corrupted files."""

import pathlib

import jax
import pytest

from tests.acceptance.corrupted import Corruption, Corruptions
from tests.acceptance.fuzz import search
from tests.acceptance.mutated import Configs, Mutated, mutated

CACHE = pathlib.Path(__file__).parents[1] / '.jax_cache' / 'fuzz'


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty folder, the current one; the settings of JAX that a binary changes are put back."""
  monkeypatch.chdir(tmp_path)
  before = {name: getattr(jax.config, name) for name in ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')}
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.full
def test_mutated_configs_run_or_are_reported_in_one_line(here):
  cases = Configs(here, CACHE, 60)
  found = search(mutated(), cases.wrong, 30)
  assert found.cases == 30 and not found.wrong, found
  ran = cases.ran
  assert not cases.wrong(Mutated('recipe', (('model.layers', '1'),))) and cases.ran == ran + 1
  for way, *change in (('flags', 'data.tokenizer.path', '~nobody_of_this_name/x'), ('recipe', 'z_loss', '10**5000'),
                       ('json', 'model.width', '9' * 5000)):
    assert not cases.wrong(Mutated(way, (tuple(change),)))


@pytest.mark.full
def test_corrupted_files_are_reported_in_one_line_and_nothing_else_is_lost(here):
  cases = Corruptions(here, CACHE, 60)
  assert sorted(cases.parameters) == [2, 4, 6]
  # Corrupted checkpoints have tests in tests/checkpoint.
  ours = cases.strategy().filter(lambda corruption: 'checkpoints/' not in corruption.file and corruption.command != 'train')
  found = search(ours, cases.wrong, 16)
  assert found.cases == 16 and cases.refused and not found.wrong, found
  assert not cases.wrong(Corruption('run/evaluation.json', 'shape', 5, 'evaluate'))


@pytest.mark.full
def test_a_wrong_case_is_found_and_reduced():
  from hypothesis import strategies as st
  found = search(st.integers(0, 1000), lambda number: 'too large' if number > 300 else '', 50)
  assert found.cases == 50 and 10 < len(found.wrong) < 50 and found.least == '301: too large'
