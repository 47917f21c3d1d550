"""Which part of which tensor is which part of which parameter, and each read out of the other, a tensor at a time."""

import collections
import dataclasses
import functools
import re
from collections.abc import Collection, Iterator, Mapping

import jax
import numpy as np

from gptjax.config import UserError
from gptjax.interop.families import Family, Tensor
from gptjax.interop.tensor_files import DTYPES, Entry
from gptjax.model import AbstractModel

PARAMETER_DTYPES = ('F32', 'BF16', 'F16')
"""Types of tensors that hold parameters: all of them fit a float32, and come back from it as they were."""

_GROUP_BYTES = 2**28
"""Parameters that are restored at once, where a single one is not larger."""


@dataclasses.dataclass(frozen=True)
class Match:
  """A model of ours and the tensors of a folder that it is, or becomes."""

  plan: AbstractModel
  tensors: tuple[Tensor, ...]
  """under the names that the folder has"""
  positions: int
  """rows of the folder's table of positions, if it has one; the model may have fewer"""

  def shape(self, tensor: Tensor) -> tuple[int, ...]:
    """What the folder's tensor must have as its shape."""
    config, (parameter, *_) = self.plan.config, tensor.parameters
    name, layer = stored(parameter, self.plan.compute.scan)
    shape = list(self.plan.shapes[name].shape[0 if layer is None else 1:])
    shape[-1] *= len(tensor.parameters)
    if tensor.rows:
      shape[1 if parameter == 'lm_head/kernel' else 0] = config.vocab_size
    if parameter == 'positions/table':
      shape[0] = self.positions
    return tuple(reversed(shape) if tensor.transposed else shape)

  @functools.cached_property
  def _sources(self) -> dict[str, list[tuple[Tensor, int]]]:
    """Of each parameter, the tensor that holds it and as which of its parts; of a stacked one, one for each layer."""
    found: dict[str, dict[int, tuple[Tensor, int]]] = collections.defaultdict(dict)
    for tensor in self.tensors:
      for part, parameter in enumerate(tensor.parameters):
        name, layer = stored(parameter, self.plan.compute.scan)
        found[name].setdefault(layer or 0, (tensor, part))
    return {name: [by_layer[layer] for layer in sorted(by_layer)] for name, by_layer in found.items()}

  def read(self, entries: Mapping[str, Entry], name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of a parameter in float32, out of a folder; nothing else is read. Rows that no id has are zero."""
    shape = self.plan.shapes[name].shape
    ranges = [range(*one.indices(size)) for one, size in zip(index, shape)]
    value = _aligned(tuple(map(len, ranges)))
    sources, layers = self._sources[name], value[None]
    if name.startswith('blocks/') and self.plan.compute.scan:
      sources, layers, ranges = [sources[layer] for layer in ranges[0]], value, ranges[1:]
    for (tensor, part), target in zip(sources, layers):
      view = entries[tensor.name].view()
      shift = part * shape[-1]
      cut = [slice(one.start, one.stop) for one in ranges[:-1]] + [slice(ranges[-1].start + shift, ranges[-1].stop + shift)]
      found = (view.T if tensor.transposed else view)[tuple(cut)]
      target[tuple(map(slice, found.shape))] = found
    return value

  def write(self, parameters: Mapping[str, jax.Array], tensor: Tensor, dtype: str) -> np.ndarray:
    """A tensor out of parameters.

    Raises:
      UserError: a number is too large for the type.
    """
    parts = []
    for parameter in tensor.parameters:
      name, layer = stored(parameter, self.plan.compute.scan)
      value = np.asarray(parameters[name])
      parts.append(value if layer is None else value[layer])
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
    value = (whole.T if tensor.transposed else whole)[tuple(map(slice, self.shape(tensor)))]
    with np.errstate(over='ignore'):
      out = value.astype(DTYPES[dtype], order='C', copy=False)
    if dtype == 'F16' and not np.array_equal(np.isfinite(out), np.isfinite(value)):
      raise UserError(f'--dtype: {tensor.name}', 'float16', 'float32 or bfloat16: it has numbers above 65504')
    return out

  def groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
    """All tensors in groups, each with the parameters it needs, about as many as fit 256 MB."""
    needed: dict[tuple[str, ...], list[Tensor]] = collections.defaultdict(list)
    for tensor in self.tensors:
      needed[tuple(stored(parameter, self.plan.compute.scan)[0] for parameter in tensor.parameters)].append(tensor)
    names: list[str] = []
    tensors: list[Tensor] = []
    size = 0
    for more, group in needed.items():
      added = sum(4 * self.plan.shapes[name].size for name in more)
      if names and size + added > _GROUP_BYTES:
        yield names, tensors
        names, tensors, size = [], [], 0
      names, tensors, size = [*dict.fromkeys([*names, *more])], tensors + group, size + added
    yield names, tensors


def stored(parameter: str, scan: bool) -> tuple[str, int | None]:
  """The name under which the model has a layer's parameter, and its place there where layers are stacked."""
  match = re.fullmatch(r'blocks/(\d+)/(.*)', parameter)
  return (f'blocks/{match[2]}', int(match[1])) if scan and match else (parameter, None)


def match(family: Family, plan: AbstractModel, positions: int, names: Collection[str] = ()) -> Match:
  """The match of a model with a folder's tensors.

  Args:
    family: of the model.
    plan: of the model.
    positions: rows of the folder's table of positions.
    names: of the folder's tensors: some leave out the family's prefix, some have a tied head once more; none: as the family has them.
  """
  tensors = [tensor if tensor.name in names else dataclasses.replace(tensor, name=short) if short in names else tensor
             for tensor in family.tensors(plan.config) for short in [tensor.name.removeprefix(family.prefix)]]
  head = family.names['lm_head/kernel']
  if plan.config.tied and head in names:
    tensors.append(Tensor(head, ('tokens/table',), rows=True))
  return Match(plan, tuple(tensors), positions)


def check(match: Match, family: Family, folder: str, entries: Mapping[str, Entry]) -> list[str]:
  """Holds a folder's tensors against what the model needs; returns the names of those that hold no parameter.

  Raises:
    UserError: one is missing, unknown, or of another shape or type; or a tied head is not the table.
  """
  wanted = {tensor.name: tensor for tensor in match.tensors}
  if missing := [name for name in wanted if name not in entries]:
    raise UserError(f'{folder}: {missing[0]}', None, f'a tensor of shape {list(match.shape(wanted[missing[0]]))}; it is missing'
                    + _and_others(missing))
  others = [name for name in entries if name not in wanted]
  if extra := [name for name in others if not re.fullmatch(family.ignored, name)]:
    raise UserError(f'{folder}: {extra[0]}', list(entries[extra[0]].shape),
                    f'only the tensors of a {family.model_type} with the sizes of its config.json' + _and_others(extra))
  for name, tensor in wanted.items():
    entry = entries[name]
    if entry.shape != match.shape(tensor):
      raise UserError(f'{folder}: {name}', list(entry.shape), f'shape {list(match.shape(tensor))}, by its config.json')
    if entry.dtype not in PARAMETER_DTYPES:
      raise UserError(f'{folder}: {name}', entry.dtype, ', '.join(PARAMETER_DTYPES))
  tables = [tensor.name for tensor in match.tensors if tensor.parameters == ('tokens/table',)]
  for other in tables[1:]:
    if not np.array_equal(raw(entries[other].view()), raw(entries[tables[0]].view())):
      raise UserError(f'{folder}: {other}', f'not {tables[0]}', 'the same numbers in the same type, since tie_word_embeddings is true')
  return others


def _and_others(names: list[str]) -> str:
  return f', like {len(names) - 1} more' if len(names) > 1 else ''


def raw(value: np.ndarray) -> np.ndarray:
  """The bits of an array, as a row of integers: what is not a number equals itself here."""
  return np.ascontiguousarray(value).reshape(-1).view(f'u{value.dtype.itemsize}')


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """Zeros in float32 that begin at a multiple of 64 bytes, which a CPU device takes as they are; others it would copy."""
  size = 4 * int(np.prod(shape))
  room = np.zeros(size + 64, np.uint8)
  first = -room.ctypes.data % 64
  return room[first:first + size].view(np.float32).reshape(shape)
