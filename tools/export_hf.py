"""`python -m tools.export_hf --workdir=RUN --folder=HF`: a run becomes a Hugging Face folder that transformers can load.

An imported run reproduces its original folder, with the same tensor names and dtypes; a run trained here becomes a folder of the
published family that its model belongs to. Parameters are restored in groups: peak memory is about 2 GB and twice the largest parameter.
"""

from absl import flags

from gptjax import config as configs
from gptjax.config import UserError
from gptjax.files import expanded
from gptjax.distributed import process_group
from gptjax.start import start
from . import check_flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_FOLDER = flags.DEFINE_string('folder', None, 'folder to write; must not exist yet', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to export: latest, best (lowest validation loss), or a step')
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', 'float32', 'bfloat16', 'float16'],
                           'dtype of the tensors; auto: as they were imported, or float32 if the run was trained here')
_SHARD_GB = flags.DEFINE_float('shard_gb', 5.0, 'maximum size of a tensor file in GB (10^9 bytes)', lower_bound=1e-6)


def main(_: None) -> None:
  """Exports --workdir."""
  start(keeps_memory=False)
  from gptjax import interop
  if process_group().count > 1:
    raise UserError('--processes', process_group().count, '1: an export runs in a single process')
  print(interop.export_run(expanded(_WORKDIR.value), expanded(_FOLDER.value), step=_STEP.value, dtype=_DTYPE.value,
                           shard_bytes=int(_SHARD_GB.value * 1e9), check=check_flags.check()))
  print(_FOLDER.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
