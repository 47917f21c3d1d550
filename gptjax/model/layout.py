"""Layouts of the layers' parameters: an array per layer (`blocks/3/mlp/up/kernel`), or all layers stacked along a first axis
(`blocks/mlp/up/kernel`), for the loop of `compute.scan` and for pipeline stages, each of which has a part of the stack."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Slots = tuple[int, ...]
"""The number of the layer in each place of a stack, -1 where none is; (): the layers in order."""

_LAYER = re.compile(r'(.*/)?blocks/(\d+)/(.*)')
_STACKED = re.compile(r'(.*/)?blocks/(?!\d+/)(.*)')


def deal_layers(layers: int, stages: int, chunks: int, head: float) -> Slots:
  """Deals layers to pipeline stages so that the stage with the most work has as little as possible.

  Virtual stage v = chunk * stages + stage has consecutive layers, and the last one the output head too, whose work is that of `head` layers
  (that of the embedding is none). In the stack, the chunks of a stage lie one after the other, each with as many places as the longest.
  """
  work = [0.0] * (stages * chunks - 1) + [head]
  counts = [1] * len(work)  # each has at least one
  for _ in range(layers - len(work)):
    least = min(range(len(work)), key=lambda v: work[v] + counts[v])
    counts[least] += 1
  order = [stage + stages * chunk for stage in range(stages) for chunk in range(chunks)]
  places = max(counts)
  return tuple(sum(counts[:v]) + place if place < counts[v] else -1 for v in order for place in range(places))


def stacked_name(name: str) -> tuple[str, int | None]:
  """A name, or a path like 'optimizer/mu/blocks/3/mlp/up/kernel', in the stacked layout, and the index of its layer, None outside."""
  match = _LAYER.fullmatch(name)
  return (f'{match[1] or ""}blocks/{match[3]}', int(match[2])) if match else (name, None)


def stack_layers(parameters: Mapping[str, Any], slots: Slots = ()) -> dict[str, Any]:
  """JAX arrays, NumPy arrays or `jax.ShapeDtypeStruct`s (whose shardings are dropped) in the stacked layout, if they are not already;
  places without a layer are zero."""
  layers: dict[str, dict[Any, Any]] = defaultdict(dict)
  for name, value in parameters.items():
    target, layer = stacked_name(name)
    layers[target][layer] = value
  def stacked(values: dict[Any, Any]) -> Any:
    if None in values:
      return values[None]
    return _stack([values[number] if number >= 0 else _zeros_like(values[0]) for number in slots or sorted(values)])
  return {name: stacked(values) for name, values in layers.items()}


def unstack_layers(parameters: Mapping[str, Any], slots: Slots = ()) -> dict[str, Any]:
  """The same values with an array per layer; the inverse of `stack_layers`."""
  index = lambda value, layer: (jax.ShapeDtypeStruct(value.shape[1:], value.dtype) if isinstance(value, jax.ShapeDtypeStruct)
                                else value[layer])
  unstacked: dict[str, Any] = {}
  for name, value in parameters.items():
    if match := _STACKED.fullmatch(name):
      places = {number: place for place, number in enumerate(slots or range(value.shape[0]))}
      unstacked |= {f'{match[1] or ""}blocks/{number}/{match[2]}': index(value, places[number]) for number in sorted(places) if number >= 0}
    else:
      unstacked[name] = value
  return unstacked


def _stack(values: list[Any]) -> Any:
  if isinstance(values[0], jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(values), *values[0].shape), values[0].dtype)
  return np.stack(values) if isinstance(values[0], np.ndarray) else jnp.stack(values)


def _zeros_like(value: Any) -> Any:
  if isinstance(value, jax.ShapeDtypeStruct):
    return value
  return np.zeros_like(value) if isinstance(value, np.ndarray) else jnp.zeros_like(value)
