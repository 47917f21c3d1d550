"""`python -m tools.import_hf --folder=HF --workdir=RUN`: a Hugging Face folder (config.json, safetensors, tokenizer) becomes a run.

RUN then has the model's config, its tokenizer and its parameters as the checkpoint of step 0, which gptjax.generate reads, and in
RUN/hf what tools.export_hf needs to give the folder back. Memory: the parameters in float32, and about 1 GB.
"""


from absl import flags

from gptjax import config as configs
from gptjax.config import MeshConfig, UserError
from gptjax.files import expanded
from gptjax.distributed import process_group
from gptjax.start import start
from tools import check_flags

_FOLDER = flags.DEFINE_string('folder', None, 'folder with config.json, safetensors and tokenizer', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the new run; must not be there yet', required=True)
_CONTEXT = flags.DEFINE_integer('context', 0, 'tokens a row of the run; 0: as many as the model is meant for', lower_bound=0)
_SCAN = flags.DEFINE_bool('scan', False, 'stack the layers, as compute.scan has them: training compiles in constant time')
_COMPUTE = flags.DEFINE_enum('compute_dtype', 'float32', ['float32', 'bfloat16'], 'what the run computes in; bfloat16 for accelerators')
_MESH_DATA = flags.DEFINE_integer('mesh_data', -1, 'devices on the axis data, which share the parameters; -1: all', lower_bound=-1)
_MESH_MODEL = flags.DEFINE_integer('mesh_model', 1, 'devices on the axis model, which share each matrix', lower_bound=1)
_TOKENIZER = flags.DEFINE_string('tokenizer', None, "folder of another tokenizer than the model's own")


def main(_: None) -> None:
  """Imports --folder."""
  start()
  from gptjax import interop
  if process_group().count > 1:
    raise UserError('--processes', process_group().count, '1: a single process imports, with all devices that it has')
  path = lambda text: expanded(text)
  options = interop.Import(_CONTEXT.value, _SCAN.value, _COMPUTE.value, MeshConfig(data=_MESH_DATA.value, model=_MESH_MODEL.value),
                           path(_TOKENIZER.value) if _TOKENIZER.value else None, check_flags.check())
  print(interop.import_folder(path(_FOLDER.value), path(_WORKDIR.value), options))
  print(_WORKDIR.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
