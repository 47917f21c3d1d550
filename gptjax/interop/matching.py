"""The correspondence between a model's parameters and a folder's tensors; either is read from the other, one tensor at a time."""

import collections
import dataclasses
import functools
import re
from collections.abc import Collection, Mapping

import jax
import numpy as np

from gptjax.config import UserError
from gptjax.interop.families import Family, Tensor
from gptjax.interop.tensor_files import DTYPES, Entry
from gptjax.model import AbstractModel, stacked_name

PARAMETER_DTYPES = ('F32', 'BF16', 'F16')
"""Dtypes of tensors that hold parameters: float32 represents all their values exactly."""

_BUFFERS = re.compile(r'(.*\.)?(rotary_emb\w*\.inv_freq|attn\.(bias|masked_bias)|position_ids)')
"""Names of tensors that hold no parameter, in folders of any family that older versions of transformers wrote."""

_MAX_GROUP_BYTES = 2**28
"""Maximum bytes of the parameters that are restored at once."""


@dataclasses.dataclass(frozen=True)
class Match:
  """A model and the tensors of the folder that it comes from or goes to."""

  model: AbstractModel
  tensors: tuple[Tensor, ...]
  """under their names in the folder"""
  positions: int
  """rows of the folder's position table, if it has one; the model may have fewer"""

  def _stored(self, tensor: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """The names in the model of the parameters that a tensor holds, each with the index of its part: the layer where the model stacks
    layers, and the expert."""
    named = [stacked_name(one) if self.model.is_stacked else (one, None) for one in tensor.parameters]
    return [(name, tuple(index for index in (layer, tensor.expert) if index is not None)) for name, layer in named]

  def shape(self, tensor: Tensor) -> tuple[int, ...]:
    """The shape that the folder's tensor must have."""
    name, place = self._stored(tensor)[0]
    shape = list(self.model.shapes[name].shape[len(place):])
    shape[-1] *= len(tensor.parameters)
    if tensor.transposed:
      shape.reverse()
    if tensor.rows or name == 'positions/table':
      shape[0] = self.model.config.vocab_size if tensor.rows else self.positions
    return tuple(shape)

  @functools.cached_property
  def _sources(self) -> dict[str, dict[tuple[int, ...], tuple[Tensor, int]]]:
    """For each parameter, the tensor that holds it and the number of its part, by the place in the parameter: (), or layer and expert."""
    found: dict[str, dict[tuple[int, ...], tuple[Tensor, int]]] = collections.defaultdict(dict)
    for tensor in self.tensors:
      for part, (name, place) in enumerate(self._stored(tensor)):
        found[name].setdefault(place, (tensor, part))
    return found

  def read(self, entries: Mapping[str, Entry], name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of a parameter in float32; only this slice is read from the files. Rows that pad the vocabulary are zero."""
    shape = self.model.shapes[name].shape
    ranges = [range(*one.indices(size)) for one, size in zip(index, shape)]
    value = _aligned(tuple(map(len, ranges)))
    sources = self._sources[name]
    leading = len(next(iter(sources)))
    for target in np.ndindex(value.shape[:leading]):
      tensor, part = sources[tuple(one[index] for one, index in zip(ranges, target))]
      view = entries[tensor.name].view()
      mine = (view.T if tensor.transposed else view)[..., part * shape[-1]:(part + 1) * shape[-1]]
      found = mine[tuple(slice(one.start, one.stop) for one in ranges[leading:])]
      value[target][tuple(map(slice, found.shape))] = found
    return value

  def write(self, parameters: Mapping[str, jax.Array], tensor: Tensor, dtype: str) -> np.ndarray:
    """A tensor of the folder, made from parameters. Raises a UserError for a value that is too large for the dtype."""
    parts = [np.asarray(parameters[name])[place] for name, place in self._stored(tensor)]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
    value = (joined.T if tensor.transposed else joined)[tuple(map(slice, self.shape(tensor)))]
    with np.errstate(over='ignore'):
      out = value.astype(DTYPES[dtype], order='C', copy=False)
    if dtype == 'F16' and not np.array_equal(np.isfinite(out), np.isfinite(value)):
      raise UserError(f'--dtype: {tensor.name}', 'float16', 'float32 or bfloat16: some values are above 65504')
    return out

  def groups(self) -> list[tuple[list[str], list[Tensor]]]:
    """All tensors in groups, each with the names of its parameters, whose bytes exceed _MAX_GROUP_BYTES by the last parameter's at most."""
    needed: dict[tuple[str, ...], list[Tensor]] = collections.defaultdict(list)
    for tensor in self.tensors:
      needed[tuple(name for name, _ in self._stored(tensor))].append(tensor)
    sizes = {name: 4 * shape.size for name, shape in self.model.shapes.items()}
    found: dict[int, tuple[list[str], list[Tensor]]] = collections.defaultdict(lambda: ([], []))
    total = 0
    for parameters, tensors in needed.items():
      names, group = found[total // _MAX_GROUP_BYTES]
      names += parameters
      group += tensors
      total += sum(sizes[name] for name in parameters)
    return list(found.values())


def match(family: Family, model: AbstractModel, positions: int, names: Collection[str] = ()) -> Match:
  """The correspondence of a model with the tensors of a folder, whose position table has `positions` rows.

  Some folders omit the family's prefix and some repeat a tied head, so `names` has the folder's tensors; empty: the family's own.
  """
  tensors = [tensor if tensor.name in names else dataclasses.replace(tensor, name=short) if short in names else tensor
             for tensor in family.tensors(model.config) for short in [tensor.name.removeprefix(family.prefix)]]
  head = family.names['lm_head/kernel']
  if model.config.tied and head in names:
    tensors.append(Tensor(head, ('tokens/table',), rows=True))
  return Match(model, tuple(tensors), positions)


def check_tensors(match: Match, family: Family, folder: str, entries: Mapping[str, Entry]) -> list[str]:
  """Checks a folder's tensors against those that the model needs; returns the names of tensors that hold no parameter. Raises a UserError
  for a tensor that is missing, unknown, or of another shape or dtype, and for a tied head that differs from the embedding table."""
  def fail(names: list[str], value: object, expected: str) -> None:
    raise UserError(f'{folder}: {names[0]}', value, expected + (f' (and {len(names) - 1} more)' if len(names) > 1 else ''))

  shapes = {tensor.name: match.shape(tensor) for tensor in match.tensors}
  if missing := [name for name in shapes if name not in entries]:
    fail(missing, None, f'a tensor of shape {list(shapes[missing[0]])}; it is missing')
  others = [name for name in entries if name not in shapes]
  if extra := [name for name in others if not _BUFFERS.fullmatch(name)]:
    fail(extra, list(entries[extra[0]].shape), f'only the tensors of a {family.model_type} model with the sizes in its config.json')
  for name, shape in shapes.items():
    if entries[name].shape != shape:
      fail([name], list(entries[name].shape), f'shape {list(shape)}, from its config.json')
    if entries[name].dtype not in PARAMETER_DTYPES:
      fail([name], entries[name].dtype, ', '.join(PARAMETER_DTYPES))
  table, *heads = [tensor.name for tensor in match.tensors if tensor.parameters == ('tokens/table',)]
  for head in heads:
    if not np.array_equal(bits(entries[head].view()), bits(entries[table].view())):
      fail([head], f'not {table}', 'the same values in the same dtype, since tie_word_embeddings is true')
  return others


def bits(value: np.ndarray) -> np.ndarray:
  """The bits of an array as a flat array of integers, in which NaN equals itself."""
  return np.ascontiguousarray(value).reshape(-1).view(f'u{value.dtype.itemsize}')


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
  """float32 zeros aligned to 64 bytes: a CPU device uses such an array as it is, and copies others."""
  size = 4 * int(np.prod(shape))
  buffer = np.zeros(size + 64, np.uint8)
  start = -buffer.ctypes.data % 64
  return buffer[start:start + size].view(np.float32).reshape(shape)
