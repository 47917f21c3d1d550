"""What the model's tests share."""

import jax
import pytest


@pytest.fixture
def matrix_products():
  """A function: the equations of all matrix products of a traced program, those of the programs inside it included."""
  def find(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'dot_general':
        yield equation
      parts = jax.tree.leaves(
          list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
      for part in parts:
        part = getattr(part, 'jaxpr', part)
        if hasattr(part, 'eqns'):
          yield from find(part)
  return find
