"""The two layouts of a model's layers: an array per layer (`blocks/3/mlp/up/kernel`), or all layers stacked along a first axis
(`blocks/mlp/up/kernel`), which is what `compute.scan` loops over."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LAYER = re.compile(r'(.*/)?blocks/(\d+)/(.*)')
_STACKED = re.compile(r'(.*/)?blocks/(?!\d+/)(.*)')


def stacked_name(name: str) -> tuple[str, int | None]:
  """A parameter's name in the stacked layout, and the index of its layer there: None for a parameter outside the layers.

  The name may be the end of a path, as in 'optimizer/mu/blocks/3/mlp/up/kernel'.
  """
  match = _LAYER.fullmatch(name)
  return (f'{match[1] or ""}blocks/{match[3]}', int(match[2])) if match else (name, None)


def stack_layers(parameters: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters in the stacked layout; those that are stacked already stay as they are.

  Args:
    parameters: JAX arrays, NumPy arrays or `jax.ShapeDtypeStruct`s (whose shardings are dropped) by name.
  """
  layers: dict[str, dict[int, Any]] = defaultdict(dict)
  stacked: dict[str, Any] = {}
  for name, value in parameters.items():
    target, layer = stacked_name(name)
    if layer is None:
      stacked[name] = value
    else:
      layers[target][layer] = value
  return stacked | {name: _stack([values[layer] for layer in sorted(values)]) for name, values in layers.items()}


def unstack_layers(parameters: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters with an array per layer; the inverse of `stack_layers`, for the same kinds of values."""
  unstacked: dict[str, Any] = {}
  for name, value in parameters.items():
    if match := _STACKED.fullmatch(name):
      unstacked |= {f'{match[1] or ""}blocks/{layer}/{match[2]}': _index(value, layer) for layer in range(value.shape[0])}
    else:
      unstacked[name] = value
  return unstacked


def _stack(values: list[Any]) -> Any:
  if isinstance(values[0], jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(values), *values[0].shape), values[0].dtype)
  return np.stack(values) if isinstance(values[0], np.ndarray) else jnp.stack(values)


def _index(value: Any, layer: int) -> Any:
  return jax.ShapeDtypeStruct(value.shape[1:], value.dtype) if isinstance(value, jax.ShapeDtypeStruct) else value[layer]
