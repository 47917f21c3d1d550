"""`python -m tools.import_peft --folder=PEFT --base=RUN --workdir=NEW`: adapters that PEFT saved become a run.

NEW can be generated from, evaluated, merged (tools.merge_lora), exported and trained further (init_from with the same lora fields), as a
run with adapters that was trained here. Kinds of adapters other than LoRA and rsLoRA are refused.
"""

from absl import flags

from gptjax import config as configs
from gptjax.files import expanded
from gptjax.start import start

_FOLDER = flags.DEFINE_string('folder', None, 'folder with adapter_config.json and adapter_model.safetensors', required=True)
_BASE = flags.DEFINE_string('base', None, 'folder of the run whose model they adapt, from tools.import_hf or gptjax.train', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the new run; must not exist yet', required=True)


def main(_: None) -> None:
  """Imports --folder."""
  start(keeps_memory=False)
  from gptjax import interop
  print(interop.import_adapters(expanded(_FOLDER.value), expanded(_BASE.value), expanded(_WORKDIR.value)))
  print(_WORKDIR.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
