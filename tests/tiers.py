"""The second tier of tests: marks of its parameters, and the check of types."""

import functools

import pytest


def full(*values, id=None):
  """A case that only `make test-all` runs."""
  return pytest.param(*values, id=id, marks=pytest.mark.full)


def checked(function):
  """beartype's decorator, for which an int is a float, as PEP 484 has it."""
  return _beartype()(function)


@functools.cache  # jaxtyping checks the fields of a dataclass by a new function for each object
def _beartype():
  from beartype import BeartypeConf, beartype

  return beartype(conf=BeartypeConf(is_pep484_tower=True))
