"""Fixtures of tests of complete runs."""

import pytest


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """The cache folder of a module's runs."""
  return tmp_path_factory.mktemp('cache')
