"""Does it fit, how fast is it, what does it cost: python -m gptjax.plan --config=configs/NAME.py --topology=v5p:4x4x4"""

import gptjax.program  # noqa: F401  (first: it handles signals)
from importlib.util import find_spec

from absl import flags

from gptjax import config as configs
from gptjax import signals

_TOPOLOGY = flags.DEFINE_string('topology', None, 'the machine: v5p:4x4x4 (TPU slice), v5p:4x4x4*2 (two), h100:8x16 (16 nodes of 8 GPUs)')
_SEARCH = flags.DEFINE_bool('search', False, 'rank meshes, ZeRO stages, remat policies and microbatches for the config')
_COMPILE = flags.DEFINE_bool('compile', True, 'compile the train step for TPU topologies (needs libtpu, but no TPU)')
_JSON = flags.DEFINE_string('json', None, 'file for all figures')
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture of the memory')


def main(config: configs.Config) -> None:
  signals.watch()
  import jax
  jax.config.update('jax_platforms', 'cpu')  # plans are made without the accelerators
  from rich.console import Console

  from gptjax import planning
  from gptjax.files import writable, write_json

  topology = planning.parse(_TOPOLOGY.value)
  json_file, picture = (writable(flag.value, f'--{flag.name}') if flag.value else None for flag in (_JSON, _PICTURE))
  if picture and picture.suffix != '.png':
    raise configs.UserError('--picture', _PICTURE.value, 'a file that ends in .png')
  compiles = topology.chip.is_tpu and _COMPILE.value
  can_compile = compiles and find_spec('libtpu') is not None
  spinner = Console(stderr=True).status
  if _SEARCH.value:
    with spinner('ranking layouts'):
      plans = planning.search(config, topology)
    print(planning.ranking(plans), flush=True)
  else:
    plans = [planning.estimate(config, topology)]
  chosen, candidates = plans[0], plans[:10]
  for number, one in enumerate(plans if can_compile else (), 1):
    if _SEARCH.value and not one.fits:
      break
    with spinner(f'compiling the train step for {topology.name}'):
      chosen = one.compile()
    if _SEARCH.value:
      print(f'{number}: the compiled program {"fits" if chosen.fits else "does not fit, next"}', flush=True)
    candidates = [chosen if other is one else other for other in candidates]
    if chosen.fits:
      break
  print(planning.describe(chosen))
  if compiles and not can_compile:
    print('libtpu is not installed: pip install -r requirements-tpu.txt to compile the program too')
  if json_file:
    found = {'plan': planning.as_json(chosen), 'candidates': [planning.as_json(one) for one in candidates] if _SEARCH.value else []}
    write_json(json_file, found)
  if picture:
    planning.draw(candidates, picture)


def script() -> None:
  """The command gptjax-plan."""
  configs.run(main)


if __name__ == '__main__':
  script()
