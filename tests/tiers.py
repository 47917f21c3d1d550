"""The second tier of tests: marks of its parameters, and the check of types."""

import pytest


def full(*values, id=None):
  """A case that only `make test-all` runs."""
  return pytest.param(*values, id=id, marks=pytest.mark.full)


def checked(function):
  """beartype's decorator, for which an int is a float, as PEP 484 has it."""
  from beartype import BeartypeConf, beartype

  return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
