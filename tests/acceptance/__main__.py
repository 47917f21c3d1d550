"""Measures what the project promises, at full size: python -m tests.acceptance --data=FOLDER [--only=NAME,...]

Every bar runs the commands a user would and writes its row into docs/bars.md with the figure, the date and the machine.
The exit status is 1 if a bar that ran was missed.
"""

import sys
import tempfile
from pathlib import Path

from absl import flags

from gptjax import config as configs
from tests.acceptance import (  # noqa: F401  (they register their bars)
  chats,
  classifying,
  datasets,
  early_signals,
  evaluation,
  experts,
  faults,
  finetuning,
  fuzz,
  generation,
  held_out,
  instructions,
  interop,
  learning_rates,
  parallelism,
  processes,
  reinforcement,
  sweeping,
  restoring,
  scaling,
  serving,
  sharding,
  training,
)
from tests.acceptance.record import BARS, write

_ONLY = flags.DEFINE_list('only', [], 'bars to run; empty: all')


def main(_) -> int:
  for name in _ONLY.value:
    if name not in BARS:
      raise configs.UserError('--only', name, ', '.join(BARS), list(BARS))
  missed = 0
  for name in _ONLY.value or BARS:
    print(f'== {name}', file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
      result = BARS[name](Path(folder))
    write({name: result})
    print(f'{name}: {"met" if result.met else "NOT MET"}: {result.figure}', flush=True)
    missed += not result.met
  return int(missed > 0)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
