"""Records that are read by their numbers: what tables and data sets share."""

import abc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gptjax.data.sources.fields import Fields
from gptjax.data.sources.source import Part, Record, Source


class Rows(Source):
  """Rows with named fields. A part is a range of them, of one file or of the whole."""

  fields: Fields

  @abc.abstractmethod
  def rows(self, part: Part) -> Iterable[Mapping[str, Any]]:
    """The rows of a part."""

  def read(self, part: Part) -> Iterator[Record]:
    for index, row in enumerate(self.rows(part)):
      yield self.fields.record(f'{part.name}#{part.start + index}', row, index)

  def ranges(self, place: str, name: str, length: int, size: int) -> Iterator[Part]:
    """Parts of `length` rows that take up `size` bytes together."""
    step = max(1, length * self.part_bytes // max(1, size))
    for start in range(0, length, step):
      yield part_of(place, name, start, min(start + step, length), length, size)


def part_of(place: str, name: str, start: int, stop: int, length: int, size: int) -> Part:
  """A part of `length` rows with `size` bytes, which it has its share of."""
  return Part(place, name, start, stop, size * stop // length - size * start // length)


def table_rows(table: Any) -> list[dict[str, Any]]:
  """Rows of an Arrow table or batch, text as bytes: nothing has checked yet that it is UTF-8."""
  import pyarrow
  columns = [column.cast(pyarrow.large_binary()) if pyarrow.types.is_string(column.type)
             or pyarrow.types.is_large_string(column.type) else column for column in table.columns]
  return type(table).from_arrays(columns, names=table.schema.names).to_pylist()
