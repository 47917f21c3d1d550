"""Parquet files: row groups, whole or in part, of which only the columns that are asked for are read."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources.fields import Fields
from gptjax.data.sources.files import File, fingerprint, opened
from gptjax.data.sources.packages import optional
from gptjax.data.sources.rows import Rows, part_of, table_rows
from gptjax.data.sources.source import Part

_BATCH = 256
"""Rows in memory at a time."""

_BUFFER = 2**22
"""Bytes of a column fetched at a time."""

_MOST_PIECES = 8
"""Parts of a row group. One that begins inside a row group decodes what lies before it there, so they are not many."""


class Parquet(Rows):
  """Parquet files, whose rows are records."""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self.files = files
    self.fields = Fields(config.text)
    self.description = description
    self.skip = config.skip
    self.size = sum(file.size for file in files)

  def fingerprint(self) -> str:
    return fingerprint('parquet', self.files, self.fields.text)

  def parts(self) -> Iterator[Part]:
    for file in self.files:
      with self._open(file.path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        cuts, length = self._cuts(groups), table.metadata.num_rows
      for start, stop in itertools.pairwise(cuts):
        yield part_of(file.path, file.name, start, stop, length, file.size)

  def _cuts(self, groups: Sequence[Any]) -> list[int]:
    """Rows at which the parts of a file begin, and the end: some row groups together, or a piece of a large one."""
    cuts, row, held = {0}, 0, 0
    for group in groups:
      columns = (group.column(i) for i in range(group.num_columns))
      size = sum(column.total_uncompressed_size for column in columns if self._is_needed(column.path_in_schema))
      if held + size > self.part_bytes:
        cuts.add(row)
        held = 0
      pieces = min(_MOST_PIECES, -(-size // self.part_bytes)) or 1
      cuts |= {row + group.num_rows * i // pieces for i in range(1, pieces)}
      row += group.num_rows
      held += size
    return sorted(cuts | {row})

  def _is_needed(self, column: str) -> bool:
    return any(f'{column}.'.startswith(f'{field}.') for field in self.fields.names)

  def rows(self, part: Part) -> Iterator[Mapping[str, Any]]:
    with self._open(part.file) as table:
      lengths = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
      begins = [0, *itertools.accumulate(lengths)]
      groups = [i for i, length in enumerate(lengths) if begins[i] < part.stop and part.start < begins[i] + length]
      row = begins[groups[0]]
      # Workers are processes that share the cores: each decodes in one thread.
      for batch in table.iter_batches(_BATCH, row_groups=groups, columns=self.fields.names, use_threads=False):
        low, high = max(part.start - row, 0), min(part.stop - row, len(batch))
        if low < high:
          yield from table_rows(batch.slice(low, high - low))
        row += len(batch)
        if row >= part.stop:
          break

  @contextlib.contextmanager
  def _open(self, path: str) -> Iterator[Any]:
    """A file, checked to have the columns."""
    arrow, parquet = optional('pyarrow', path), optional('pyarrow.parquet', path)
    with opened(path) as file:
      try:
        table = parquet.ParquetFile(file, buffer_size=_BUFFER)
        self.fields.check([table.schema.column(i).path for i in range(len(table.schema))], path)
        yield table
      except UserError:
        raise
      except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError('data.source.path', path, f'a whole Parquet file ({error})') from None
