"""Repeats logged steps of a run and compares the metrics: python -m tools.replay --workdir=DIR --step=STEP [--cpu_devices=N]

It starts at the newest checkpoint before that step, writes nothing into the workdir, and prints the logged and the repeated values. On the
devices of the run, with its versions, all are bitwise equal; the exit status is 1 if a difference exceeds --tolerance.
"""

import json
from pathlib import Path

from absl import flags
from rich.table import Column, Table

from gptjax import config as configs
from gptjax.data import progress
from gptjax.files import expanded
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_REWARDS = flags.DEFINE_string('reward_file', None, 'file of Python with the rewards of the run, as for gptjax.train')
_STEP = flags.DEFINE_integer('step', None, 'a logged step', required=True, lower_bound=1)
_TOLERANCE = flags.DEFINE_float('tolerance', 0.0, 'largest accepted relative difference; 0: bitwise equality', lower_bound=0)


def main(_) -> int:
  workdir = expanded(_WORKDIR.value, '--workdir')
  cache = start(configs.read_config(workdir))
  from gptjax.distributed import is_primary
  from gptjax.training.replaying import replay
  table = Table('step', Column('field', overflow='fold'), 'logged', 'now', 'relative difference')
  worst, steps = 0.0, 0
  for one in replay(workdir, _STEP.value, cache, expanded(_REWARDS.value, '--reward_file') if _REWARDS.value else None):
    worst, steps = max(worst, one.difference), steps + 1
    for name, away in one.differences.items():
      if away or one.step == _STEP.value:
        table.add_row(str(one.step), name, repr(one.logged[name]), repr(one.again.get(name)), f'{away:.1e}' if away else '')
  if is_primary():
    console = progress.console()
    console.print(table)
    equal = 'bitwise equal' if not worst else f'largest relative difference {worst:.1e}{_elsewhere(workdir)}'
    console.print(f'{steps} logged steps repeated: {equal}')
  return int(worst > _TOLERANCE.value)


def _elsewhere(workdir: Path) -> str:
  """Describes the devices and versions now and in the run, which may explain a difference."""
  import jax
  facts = json.loads((workdir / 'run.json').read_text())
  now = f'{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}'
  return f'; now on {now}, then on {facts["device"]}, {facts["versions"].partition(",")[0]}'


if __name__ == '__main__':
  configs.run(main, needs_config=False)
