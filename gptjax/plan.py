"""Will it fit, how fast, at what cost: python -m gptjax.plan --config=configs/NAME.py --topology=v5p:4x4x4"""

import json
from pathlib import Path

from absl import flags, logging

from gptjax import config as configs

_TOPOLOGY = flags.DEFINE_string('topology', None, 'the machine: v5p:4x4x4 (TPU slice), v5p:4x4x4*2 (two), h100:8x16 (16 nodes of 8 GPUs)')
_SEARCH = flags.DEFINE_bool('search', False, 'rank meshes, ZeRO stages, remat policies and microbatches for the config')
_COMPILE = flags.DEFINE_bool('compile', True, 'compile the train step for TPU topologies (needs libtpu, no TPU)')
_JSON = flags.DEFINE_string('json', None, 'file for all figures')
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture of the memory')


def main(config: configs.Config) -> None:
  logging.set_verbosity(logging.FATAL)
  import jax
  jax.config.update('jax_platforms', 'cpu')  # plans are made beside machines, not on them
  from rich.console import Console

  from gptjax import planning
  from gptjax.files import write_atomic
  from gptjax.planning.program import needs_libtpu
  from gptjax.planning.search import confirm

  topology = planning.parse(_TOPOLOGY.value)
  missing = needs_libtpu() if topology.chip.is_tpu and _COMPILE.value else None
  can_compile = topology.chip.is_tpu and _COMPILE.value and not missing
  spinner = Console(stderr=True).status
  if _SEARCH.value:
    with spinner('ranking layouts'):
      plans = planning.search(config, topology)
    print(planning.ranking(plans), flush=True)
    chosen = plans[0]
    if can_compile:
      for number, done in enumerate(_with_spinner(confirm(plans), spinner), 1):
        print(f'{number}: {"the compiled program fits" if done.fits else "the compiled program does not fit, next"}', flush=True)
        chosen = done
    shown = [chosen if one.config == chosen.config else one for one in plans[:10]]
  else:
    chosen = planning.estimate(config, topology)
    if can_compile:
      with spinner(f'compiling the train step for {topology.name}'):
        chosen = chosen.compile()
    shown = [chosen]
  print(planning.describe(chosen))
  if missing:
    print(missing)
  if _JSON.value:
    write_atomic(Path(_JSON.value), json.dumps({'plan': planning.as_json(chosen), 'candidates': [
      planning.as_json(one) for one in shown] if _SEARCH.value else []}, indent=1) + '\n')
  if _PICTURE.value:
    planning.draw(shown, Path(_PICTURE.value))


def _with_spinner(plans, spinner):
  while True:
    with spinner('compiling the train step'):
      done = next(plans, None)
    if done is None:
      return
    yield done


if __name__ == '__main__':
  configs.run(main)
