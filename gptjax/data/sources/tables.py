"""Sources of rows that are read by index: Parquet files and Hugging Face datasets."""

import abc
import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gptjax.config import SourceConfig, UserError
from gptjax.data.folders import library_errors
from gptjax.data.sources.classes import ClassifiedTexts
from gptjax.data.sources.examples import Examples, fields_of
from gptjax.data.sources.files import File, FileSource, opened
from gptjax.data.sources.source import Fields, Part, Record, Source

_BATCH = 256  # rows in memory at a time
_BUFFER = 2**22  # bytes of a column fetched at a time
_MAX_PARTS_PER_GROUP = 8  # few, because reading a part that starts inside a row group decodes the rows before it


class TableSource(Source):
  """Rows with named fields. A part is a range of the rows of a file, or of the split of a dataset."""

  fields: Fields | Examples | ClassifiedTexts
  length: int
  """rows of the split"""
  split: str
  version: str
  """changes with the rows"""

  def fingerprint(self) -> str:
    return hashlib.sha256(f'{self.description} {self.version} {self.fields.text}'.encode()).hexdigest()

  def parts(self) -> Iterator[Part]:
    return self.ranges(self.description, self.split, self.length, self.size)

  @abc.abstractmethod
  def rows(self, part: Part) -> Iterable[Mapping[str, Any]]:
    """The rows of a part."""

  def read(self, part: Part) -> Iterator[Record]:
    for index, row in enumerate(self.rows(part)):
      yield self.fields.record(f'{part.name}#{part.start + index}', row, index)

  def ranges(self, file: str, name: str, length: int, size: int, cuts: Iterable[int] = ()) -> Iterator[Part]:
    """Cuts `length` rows of `size` bytes into parts, at `cuts`, which begin with 0, or evenly."""
    cuts = cuts or range(0, length, max(1, length * self.part_bytes // max(1, size)))
    for start, stop in itertools.pairwise(sorted({*cuts, length})):
      yield Part(file, name, start, stop, size * stop // length - size * start // length)


def table_rows(table: Any) -> list[dict[str, Any]]:
  """Rows of an Arrow table or batch, with strings as bytes, because Arrow does not check that they are UTF-8."""
  import pyarrow
  columns = [column.cast(pyarrow.large_binary()) if pyarrow.types.is_string(column.type)
             or pyarrow.types.is_large_string(column.type) else column for column in table.columns]
  return type(table).from_arrays(columns, names=table.schema.names).to_pylist()


class Parquet(FileSource, TableSource):
  """Parquet files, whose rows are records. A part is several row groups, or a range of a large one; only the needed columns are read."""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self.fields = fields_of(config)
    super().__init__(files, description, config, 'parquet', self.fields.text)

  def parts(self) -> Iterator[Part]:
    for file in self.files:
      with self._open(file.path) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        length = table.metadata.num_rows
      yield from self.ranges(file.path, file.name, length, file.size, self._cuts(groups))

  def _cuts(self, groups: Sequence[Any]) -> set[int]:
    """First rows of a file's parts."""
    cuts, row, held = {0}, 0, 0
    for group in groups:
      columns = (group.column(i) for i in range(group.num_columns))
      size = sum(column.total_uncompressed_size for column in columns
                 if any(f'{column.path_in_schema}.'.startswith(f'{field}.') for field in self.fields.names))
      if held + size > self.part_bytes:
        cuts.add(row)
        held = 0
      count = min(_MAX_PARTS_PER_GROUP, -(-size // self.part_bytes)) or 1
      cuts |= {row + group.num_rows * i // count for i in range(1, count)}
      row += group.num_rows
      held += size
    return cuts

  def rows(self, part: Part) -> Iterator[Mapping[str, Any]]:
    with self._open(part.file) as table:
      ends = list(itertools.accumulate(table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)))
      groups = [i for i, (start, end) in enumerate(zip([0, *ends], ends)) if start < part.stop and part.start < end]
      row = [0, *ends][groups[0]]
      # Single-threaded, because worker processes already use all cores.
      for batch in table.iter_batches(_BATCH, row_groups=groups, columns=self.fields.names, use_threads=False):
        low, high = max(part.start - row, 0), min(part.stop - row, len(batch))
        if low < high:
          yield from table_rows(batch.slice(low, high - low))
        row += len(batch)
        if row >= part.stop:
          break

  @contextlib.contextmanager
  def _open(self, path: str) -> Iterator[Any]:
    """Opens a file and checks that it has the columns."""
    import pyarrow.parquet
    errors = pyarrow.ArrowException, OSError, UnicodeDecodeError
    with opened(path) as file, library_errors('data.source.path', path, 'an undamaged Parquet file', errors):
      table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER)
      self.fields.check([table.schema.column(i).path for i in range(len(table.schema))], path)
      yield table


class HuggingFace(TableSource):
  """The rows of a split of 'hf:FOLDER', 'hf:NAME' or 'hf:NAME:CONFIGURATION', in memory-mapped tables."""

  def __init__(self, config: SourceConfig):
    self.fields, self.split = fields_of(config), config.split
    self.skip, self.has_examples, self.labels = config.skip, config.has_examples, config.labels
    name = config.path.removeprefix('hf:')
    folder = os.path.expanduser(name)
    # The hub's client and the libraries below it raise errors of many classes: no such dataset, no access, no network.
    with library_errors('data.source.path', config.path, 'hf: and a dataset that can be loaded here, or its folder'):
      import datasets
      if os.path.isdir(folder):
        name, dataset = os.path.basename(os.path.abspath(folder)), datasets.load_from_disk(folder)
        if isinstance(dataset, datasets.DatasetDict):
          if config.split not in dataset:
            raise UserError('data.source.split', config.split, f'a split of {config.path}: {", ".join(dataset)}', names=list(dataset))
          dataset = dataset[config.split]
      else:
        repository, _, configuration = name.partition(':')
        dataset = datasets.load_dataset(repository, configuration or None, split=config.split)
    self.description = f'hf:{name}, split {config.split}'
    self.fields.check(dataset.column_names, config.path)
    self.version = dataset._fingerprint
    columns = [name for name in dataset.column_names if any(f'{field}.'.startswith(f'{name}.') for field in self.fields.names)]
    self._rows = dataset.select_columns(columns).with_format('arrow')
    self.length, self.size = len(self._rows), self._rows.data.nbytes

  def rows(self, part: Part) -> Sequence[Mapping[str, Any]]:
    return table_rows(self._rows[part.start:part.stop])
