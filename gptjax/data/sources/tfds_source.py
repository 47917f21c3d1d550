"""TFDS datasets: those of its catalogue, prepared folders, and the user's own builders. Importing this imports TFDS."""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from gptjax.config import SourceConfig, UserError
from gptjax.data.progress import announce
from gptjax.data.sources.fields import Fields
from gptjax.data.sources.rows import Rows
from gptjax.data.sources.source import Part


class TfdsRecords(Rows):
  """The records of a dataset's split, read by their numbers without TensorFlow; prepared first where it is not there.

  Args:
    config: `path` is 'tfds:' and a dataset's name ('NAME/CONFIG:VERSION'), the folder of a prepared one ('/DIR/NAME/1.0.0')
      or a builder's class ('MODULE:CLASS', found from the working directory or PYTHONPATH); `split` may be a slice.

  Raises:
    UserError: there is no such dataset, split or field, or TFDS cannot prepare it here as array_record.
  """

  def __init__(self, config: SourceConfig):
    self.fields = Fields(config.text)
    self.skip = config.skip
    self._path, self._split = config.path, config.split
    with _errors(config.path):
      builder = _prepared(config.path.partition(':')[2])
    info = builder.info
    self.fields.check(_leaves(info.features), info.full_name)
    with _errors(config.path):
      try:
        self._length = info.splits[config.split].num_examples
      except (ValueError, KeyError):
        raise UserError('data.source.split', config.split, f'a split of {info.full_name}: {", ".join(info.splits)}',
                        names=list(info.splits)) from None
      self._directory = str(builder.data_dir)
      self._open()
    # Slices do not know their bytes.
    splits = info.splits.values()
    self.size = sum(split.num_bytes for split in splits) * self._length // max(1, sum(split.num_examples for split in splits))
    self.description = f'tfds:{info.full_name}, split {config.split}'

  def fingerprint(self) -> str:
    known = f'{self.description} {self._length} {self.size} {self.fields.text}'
    return hashlib.sha256(known.encode()).hexdigest()

  def parts(self) -> Iterator[Part]:
    yield from self.ranges(self.description, self._split, self._length, self.size)

  def rows(self, part: Part) -> Sequence[Mapping[str, Any]]:
    with _errors(self._path):
      return self._records.__getitems__(range(part.start, part.stop))

  @functools.cached_property
  def _records(self) -> Any:
    return self._open()

  def _open(self) -> Any:
    return tfds.builder_from_directory(self._directory).as_data_source(self._split)


def _prepared(name: str) -> tfds.core.DatasetBuilder:
  folder = os.path.expanduser(name)
  if os.path.isdir(folder):
    return tfds.builder_from_directory(folder)
  module, _, cls = name.rpartition(':')
  if module and cls.isidentifier():
    builder = _builder_class(module, cls)(file_format='array_record')
  else:
    builder = tfds.builder(name, file_format='array_record')
  if not builder.data_path.exists():  # is_prepared() warns
    announce(f'preparing {builder.info.full_name} in {builder.data_dir}')
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # stdout belongs to the binaries
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  return builder


def _builder_class(module: str, name: str) -> type[tfds.core.DatasetBuilder]:
  if '' not in sys.path and os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    found = getattr(importlib.import_module(module), name, None)
  except ModuleNotFoundError as error:
    if not f'{module}.'.startswith(f'{error.name}.'):
      raise
    raise UserError('data.source.path', f'tfds:{module}:{name}', 'a module in the working directory or on PYTHONPATH') from None
  if not (isinstance(found, type) and issubclass(found, tfds.core.DatasetBuilder)):
    names = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
    raise UserError('data.source.path', f'tfds:{module}:{name}', 'the name of a tfds.core.GeneratorBasedBuilder', names=names,
                    given=name)
  return found


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
  try:
    yield
  except UserError:
    raise
  except tfds.core.DatasetNotFoundError:
    name = path.partition(':')[2]
    raise UserError('data.source.path', path, 'tfds: and a dataset of TFDS, a folder with a prepared one, or MODULE:CLASS',
                    names={known: f'tfds:{known}' for known in tfds.list_builders(with_community_datasets=False)}, given=name) from None
  except ModuleNotFoundError as error:
    raise UserError('data.source.path', path, f'a machine with the {error.name} package: pip install {error.name}') from None
  except Exception as error:
    # Builders are programs of their own, which fail in any way: without network, without a package that they need.
    reason = next(iter(str(error).strip().splitlines()), '')
    raise UserError('data.source.path', path, 'a dataset that is prepared as array_record, or that TFDS can prepare here '
                    f'({type(error).__name__}: {reason})') from None


def _leaves(features: Any, above: str = '') -> list[str]:
  if not isinstance(features, tfds.features.FeaturesDict):
    return [above.removesuffix('.')]
  return [leaf for name, feature in features.items() for leaf in _leaves(feature, f'{above}{name}.')]
