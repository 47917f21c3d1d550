"""`python -m tools.merge_lora --workdir=RUN --out=NEW`: a run with adapters becomes one without, with the same function.

The adapters are added to the matrices that they adapt, in float32. NEW has the tokenizer and the validation sets of RUN, and its parameters
as the checkpoint of step 0, from which other runs can start (init_from), with adapters of their own or in full.
"""

from absl import flags

from gptjax import config as configs
from gptjax.files import expanded
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run with adapters (lora.rank above 0)', required=True)
_OUT = flags.DEFINE_string('out', None, 'folder of the new run; must not exist yet', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to merge: latest, best (lowest validation loss), or a step')


def main(_: None) -> None:
  """Merges --workdir."""
  start(keeps_memory=False)
  from gptjax import interop
  print(interop.merge_adapters(expanded(_WORKDIR.value), expanded(_OUT.value), _STEP.value))
  print(_OUT.value)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
