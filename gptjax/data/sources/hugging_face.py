"""Hugging Face datasets, from the hub or a folder that datasets.save_to_disk wrote."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources.fields import Fields
from gptjax.data.sources.packages import optional
from gptjax.data.sources.rows import Rows, table_rows
from gptjax.data.sources.source import Part


class HuggingFace(Rows):
  """The rows of a dataset's split. Its tables are memory-mapped, and pickled as the names of their files.

  Args:
    config: `path` is 'hf:' and a folder, or a name on the hub, perhaps with a configuration: 'hf:NAME:CONFIGURATION'.

  Raises:
    UserError: there is no such dataset, split or column, or the hub cannot be reached.
  """

  def __init__(self, config: SourceConfig):
    self.fields = Fields(config.text)
    self.skip = config.skip
    self._split = config.split
    dataset = _load(config)
    name = config.path.partition(':')[2]
    name = os.path.basename(os.path.abspath(name)) if _folder(name) else name
    self.description = f'hf:{name}, split {config.split}'
    self.fields.check(dataset.column_names, config.path)
    self._known = dataset._fingerprint
    columns = dict.fromkeys(field.partition('.')[0] for field in self.fields.names)
    self._rows = dataset.select_columns(list(columns)).with_format('arrow')
    self.size = self._rows.data.nbytes

  def fingerprint(self) -> str:
    return hashlib.sha256(f'{self.description} {self._known} {self.fields.text}'.encode()).hexdigest()

  def parts(self) -> Iterator[Part]:
    yield from self.ranges(self.description, self._split, len(self._rows), self.size)

  def rows(self, part: Part) -> Sequence[Mapping[str, Any]]:
    return table_rows(self._rows[part.start:part.stop])


def _folder(name: str) -> str:
  """The folder that a name is, or nothing."""
  folder = os.path.expanduser(name)
  return folder if os.path.isdir(folder) else ''


def _load(config: SourceConfig) -> Any:
  datasets = optional('datasets', config.path)
  name = config.path.partition(':')[2]
  try:
    if _folder(name):
      dataset = datasets.load_from_disk(_folder(name))
      if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
          raise UserError('data.source.split', config.split, f'a split of {config.path}: {", ".join(dataset)}',
                          names=list(dataset))
        dataset = dataset[config.split]
      return dataset
    name, _, configuration = name.partition(':')
    return datasets.load_dataset(name, configuration or None, split=config.split)
  except UserError:
    raise
  except Exception as error:
    # The hub's client has errors of its own and those of libraries below it: no such dataset, no access, no network.
    reason = next(iter(str(error).strip().splitlines()), '')
    raise UserError('data.source.path', config.path, 'hf: and a dataset that can be loaded here, or the folder of one '
                    f'({type(error).__name__}: {reason})') from None
