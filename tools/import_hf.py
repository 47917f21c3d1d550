"""`python -m tools.import_hf --folder=HF --workdir=RUN`: a Hugging Face folder (config.json, safetensors, tokenizer) becomes a run.

RUN gets the model's config, its tokenizer and its parameters as the checkpoint of step 0, which gptjax.generate reads, and in RUN/hf
what tools.export_hf needs to reproduce the folder. Peak memory: the parameters in float32 and about 1 GB.
"""

from absl import flags

from gptjax import config as configs
from gptjax.config import MeshConfig, UserError
from gptjax.files import expanded
from gptjax.distributed import process_group
from gptjax.start import start
from . import check_flags

_FOLDER = flags.DEFINE_string('folder', None, 'folder with config.json, safetensors and tokenizer', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the new run; must not exist yet', required=True)
_CONTEXT = flags.DEFINE_integer('context', 0, 'tokens per row of the run; 0: the context length of the model', lower_bound=0)
_SCAN = flags.DEFINE_bool('scan', False, 'stack the layers (compute.scan): compile time does not grow with their number')
_COMPUTE = flags.DEFINE_enum('compute_dtype', 'float32', ['float32', 'bfloat16'], 'compute dtype of the run; bfloat16 for accelerators')
_MESH_DATA = flags.DEFINE_integer('mesh_data', -1, 'size of mesh axis data, which shards parameters; -1: all devices', lower_bound=-1)
_MESH_MODEL = flags.DEFINE_integer('mesh_model', 1, 'size of mesh axis model, over which each matrix is split', lower_bound=1)
_TOKENIZER = flags.DEFINE_string('tokenizer', None, "folder of a tokenizer that replaces the model's own")


def main(_: None) -> None:
  """Imports --folder."""
  start(keeps_memory=False)
  from gptjax import interop
  if process_group().count > 1:
    raise UserError('--processes', process_group().count, '1: an import runs in a single process, on all its devices')
  print(interop.import_folder(
    expanded(_FOLDER.value), expanded(_WORKDIR.value), context=_CONTEXT.value, scan=_SCAN.value, dtype=_COMPUTE.value,
    mesh=MeshConfig(data=_MESH_DATA.value, model=_MESH_MODEL.value), tokenizer=expanded(_TOKENIZER.value) if _TOKENIZER.value else None,
    check=check_flags.check()))
  print(_WORKDIR.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
