"""The TFDS dataset of the embedded corpus. Importing this imports TFDS (but not TensorFlow)."""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from gptjax.data.progress import Work
from gptjax.data.sources.source import Document


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """Sources of Python's standard library: an example is a module's name and its text."""

  VERSION = tfds.core.Version('{}.{}.{}'.format(*sys.version_info))

  # Nothing is downloaded, so there are no checksums, which TFDS looks for beside this path (and asks a package for the
  # path that it does not depend on).
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
    with Work('building the dataset of the standard library', len(self._modules), 'documents') as work:
      for document in self._modules:
        yield document.name, {'name': document.name, 'text': document.text}
        work.advance(1)


def build_and_read(modules: Sequence[Document], data_dir: Path) -> list[Document]:
  """Builds the dataset in `data_dir` unless it is there, and reads it: documents in the order of their names.

  TFDS builds in a folder of its own and renames it when it is whole.
  """
  builder = PythonStdlib(modules=modules, data_dir=data_dir, file_format='array_record')
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and there is none.
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  records = builder.as_data_source(split='train')
  documents = (Document(record['name'].decode(), record['text'].decode()) for record in records)
  return sorted(documents, key=lambda document: document.name)
