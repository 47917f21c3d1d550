"""Trains a model: python -m gptjax.train --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE ...]"""

import os
import re
import sys

from absl import flags

from gptjax import config as configs
from gptjax.files import expanded
from gptjax.start import start
from gptjax.supervision import supervise

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run; one that holds a run is resumed')
_LOG_EVERY = flags.DEFINE_integer('log_every', 10, 'steps between logged lines', lower_bound=1)
_STOP_AT = flags.DEFINE_integer(
  'stop_at', 0, 'save and end after this step, with the schedule as it is; 0: the last', lower_bound=0)
_PROFILE = flags.DEFINE_string('profile_steps', None, 'first and last step of a profiler trace, as 10:13')
_ACCEPT = flags.DEFINE_bool(
  'accept_changes', False, "go on in a workdir with a config that computes something else than the one it was begun with")
_HANG = flags.DEFINE_float(
  'hang_timeout', 1800, "seconds without a step, validation batch or save after which every thread's stack is written and the process "
  'ends; 0: never', lower_bound=0)
_RESTARTS = flags.DEFINE_integer(
  'max_restarts', 0, 'most times that the run is started again after a crash, with a pause and for as long as it gets on; 0: it is '
  'not supervised', lower_bound=0)
_PRINT = flags.DEFINE_bool('print_config', False, 'print the config with all overrides in, and end')


def main(config: configs.Config) -> int:
  if _PRINT.value:
    print(configs.describe(config))
    return 0
  if not _WORKDIR.value:
    raise configs.UserError('--workdir', _WORKDIR.value, 'a folder for the run')
  workdir = expanded(_WORKDIR.value)
  if workdir.exists() and not workdir.is_dir():
    raise configs.UserError('--workdir', str(workdir), 'a folder, not a file')
  profile_steps = _steps(_PROFILE.value)
  if _RESTARTS.value:
    # Done, a mistake, and saved when asked to end.
    return supervise([sys.executable, '-m', 'gptjax.train', *sys.argv[1:], '--max_restarts=0'], workdir, _RESTARTS.value,
                     ended=(0, 2, os.EX_TEMPFAIL))
  cache = start(config)
  from gptjax import training
  options = training.Options(workdir, cache, log_every=_LOG_EVERY.value, stop_at=_STOP_AT.value, profile_steps=profile_steps,
                             accept_changes=_ACCEPT.value, hang_timeout=_HANG.value)
  try:
    return training.train(config, options)
  except OSError as error:  # a machine's fault, after which another start may do, and no mistake
    place = error.filename or 'system'
    raise configs.Fault(f'{place}: {error.strerror or error}, expected: a place that can be read and written') from error


def _steps(text: str | None) -> tuple[int, int] | None:
  if text is None:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or not 1 <= int(match[1]) <= int(match[2]):
    raise configs.UserError('--profile_steps', text, 'FIRST:LAST with 1 <= FIRST <= LAST, as 10:13')
  return int(match[1]), int(match[2])


if __name__ == '__main__':
  configs.run(main)
