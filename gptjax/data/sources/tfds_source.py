"""TFDS datasets: of its catalogue, in prepared folders, of a user's builder, and the embedded corpus. Imports TFDS, not TensorFlow."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from gptjax.config import SourceConfig, UserError
from gptjax.data.folders import library_errors
from gptjax.data.progress import ProgressBar, announce
from gptjax.data.sources.examples import fields_of
from gptjax.data.sources.source import Document, Part
from gptjax.data.sources.tables import TableSource

downloader.MAX_RETRIES = 3  # by default TFDS tries for minutes to reach a server, as on a machine without a network

_EXPECTED = 'a dataset that is prepared as array_record, or that TFDS can prepare here'


class TfdsRecords(TableSource):
  """The records of a dataset's split or a slice of it, read by index. The dataset is prepared if necessary.

  The path is 'tfds:' and a dataset's name ('NAME/CONFIG:VERSION'), the folder of a prepared one ('/DIR/NAME/1.0.0') or a builder class
  ('MODULE:CLASS', imported from the working directory or PYTHONPATH).
  """

  def __init__(self, config: SourceConfig):
    self.fields, self.split = fields_of(config), config.split
    self.skip, self.has_examples, self.labels = config.skip, config.has_examples, config.labels
    self._path = config.path
    with library_errors('data.source.path', config.path, _EXPECTED):
      builder = _prepared(config.path.removeprefix('tfds:'))
      info = builder.info
      self.fields.check(_leaves(info.features), info.full_name)
      try:
        self.length = info.splits[config.split].num_examples
      except (ValueError, KeyError):
        raise UserError('data.source.split', config.split, f'a split of {info.full_name}: {", ".join(info.splits)}',
                        names=list(info.splits)) from None
      self._records = tfds.builder_from_directory(str(builder.data_dir)).as_data_source(config.split)
    # Slices do not know their bytes.
    splits = info.splits.values()
    self.size = sum(split.num_bytes for split in splits) * self.length // max(1, sum(split.num_examples for split in splits))
    self.description = f'tfds:{info.full_name}, split {config.split}'
    self.version = f'{self.length} {self.size}'

  def rows(self, part: Part) -> Sequence[Mapping[str, Any]]:
    with library_errors('data.source.path', self._path, _EXPECTED):
      return self._records.__getitems__(range(part.start, part.stop))


def prepare_quietly(builder: tfds.core.DatasetBuilder) -> None:
  """Prepares a dataset, without TFDS's output on stdout, which belongs to the commands."""
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def _prepared(name: str) -> tfds.core.DatasetBuilder:
  folder = os.path.expanduser(name)
  if os.path.isdir(folder):
    return tfds.builder_from_directory(folder)
  module, _, cls = name.rpartition(':')
  try:
    builder = (_builder_class(module, cls)(file_format='array_record') if module and cls.isidentifier() else
               tfds.builder(name, file_format='array_record'))
  except tfds.core.DatasetNotFoundError:
    names = {known: f'tfds:{known}' for known in tfds.list_builders(with_community_datasets=False)}
    raise UserError('data.source.path', f'tfds:{name}', 'tfds: and a dataset of TFDS, the folder of a prepared one, or MODULE:CLASS',
                    names=names, given=name) from None
  if not builder.data_path.exists():  # is_prepared() warns
    announce(f'preparing {builder.info.full_name} in {builder.data_dir}')
    prepare_quietly(builder)
  return builder


def _builder_class(module: str, name: str) -> type[tfds.core.DatasetBuilder]:
  if not {'', os.getcwd()} & {*sys.path}:
    sys.path.append(os.getcwd())
  path = f'tfds:{module}:{name}'
  try:
    names = vars(importlib.import_module(module))
  except ModuleNotFoundError as error:
    if not f'{module}.'.startswith(f'{error.name}.'):
      raise
    raise UserError('data.source.path', path, 'a module in the working directory or on PYTHONPATH') from None
  found = names.get(name)
  if not (isinstance(found, type) and issubclass(found, tfds.core.DatasetBuilder)):
    raise UserError('data.source.path', path, 'the name of a tfds.core.GeneratorBasedBuilder', given=name,
                    names=[key for key, value in names.items() if isinstance(value, type)])
  return found


def _leaves(features: Any, prefix: str = '') -> list[str]:
  """Full names of all features."""
  if not isinstance(features, tfds.features.FeaturesDict):
    return [prefix.removesuffix('.')]
  return [leaf for name, feature in features.items() for leaf in _leaves(feature, f'{prefix}{name}.')]


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """Sources of Python's standard library: an example is a module's name and its text."""

  VERSION = tfds.core.Version('{}.{}.{}'.format(*sys.version_info))

  # TFDS looks for checksums of downloads beside this path, and needs an undeclared dependency to find it; nothing is downloaded.
  code_path = None

  def __init__(self, *, modules: Sequence[Document], **kwargs):
    self._modules = modules
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({'name': tfds.features.Text(), 'text': tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features, license='PSF-2.0',
                                 homepage='https://docs.python.org/3/library/')

  def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
    with ProgressBar('building the dataset of the standard library', len(self._modules), 'documents') as progress:
      for document in self._modules:
        yield document.name, {'name': document.name, 'text': document.text}
        progress.advance(1)
