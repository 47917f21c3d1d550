"""Parameters of the second tier of tests."""

import pytest


def full(*values, id=None):
  """A case that only `make test-all` runs."""
  return pytest.param(*values, id=id, marks=pytest.mark.full)
