"""`python -m tools.export_peft --workdir=RUN --folder=OUT`: the adapters of a run become a folder that PEFT loads.

It has adapter_config.json and adapter_model.safetensors. PEFT applies them to the base, which tools.export_hf writes from the run that
init_from named.
"""

from absl import flags

from gptjax import config as configs
from gptjax.files import expanded
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run with adapters (lora.rank above 0)', required=True)
_FOLDER = flags.DEFINE_string('folder', None, 'folder to write; must not exist yet', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to export: latest, best (lowest validation loss), or a step')
_BASE = flags.DEFINE_string('base', '', 'name or folder of the base, for base_model_name_or_path; empty: none')


def main(_: None) -> None:
  """Exports --workdir."""
  start(keeps_memory=False)
  from gptjax import interop
  print(interop.export_adapters(expanded(_WORKDIR.value), expanded(_FOLDER.value), step=_STEP.value, base=_BASE.value))
  print(_FOLDER.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
