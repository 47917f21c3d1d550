"""`python -m tools.export_hf --workdir=RUN --folder=HF`: a run becomes a Hugging Face folder, which transformers opens.

A run that was imported gives its folder back, tensors of the same names and types; one trained here, a folder of the published
family that its model is of. Memory: some parameters at a time, beside 2 GB the largest of them twice.
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
                           'type of the tensors; auto: as they were imported, float32 where the run was trained here')
_SHARD_GB = flags.DEFINE_float('shard_gb', 5.0, 'largest file of tensors, in GB (10^9 bytes); more go to several', lower_bound=1e-6)


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
