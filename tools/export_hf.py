"""`python -m tools.export_hf --workdir=RUN --folder=HF`: a run becomes a Hugging Face folder, which transformers opens.

An imported run becomes the same folder again, with tensors of the same names and dtypes; a run trained here becomes a folder of the
published family that has its architecture. Memory: some parameters at a time: 2 GB, and twice the largest one.
"""

from absl import flags

from gptjax import config as configs
from gptjax.config import UserError
from gptjax.files import expanded
from gptjax.distributed import process_group
from gptjax.start import start
from tools import check_flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_FOLDER = flags.DEFINE_string('folder', None, 'folder to write; must not be there yet', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to export: latest, best (lowest validation loss), or a step')
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', 'float32', 'bfloat16', 'float16'],
                           'dtype of the tensors; auto: as they were imported, float32 for a run trained here')
_SHARD_GB = flags.DEFINE_float('shard_gb', 5.0, 'largest size of a file of tensors, in GB (10^9 bytes)', lower_bound=1e-6)


def main(_: None) -> None:
  """Exports --workdir."""
  start()
  from gptjax import interop
  if process_group().count > 1:
    raise UserError('--processes', process_group().count, '1: a single process exports')
  options = interop.Export(_STEP.value, _DTYPE.value, int(_SHARD_GB.value * 1e9), check_flags.check())
  print(interop.export_run(expanded(_WORKDIR.value), expanded(_FOLDER.value), options))
  print(_FOLDER.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
