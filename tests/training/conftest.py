"""Fixtures of tests of complete runs: a cache, and a known speed of the machine, whose measurement takes a second per run."""

import pytest

from gptjax.training import loop


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """The cache folder of a module's runs."""
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(autouse=True, scope='module')
def undisturbed():
  """Runs take the machine's speed as known."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'peak_flops', lambda devices, dtype: (1e12, 'assumed'))
    yield
