"""Trains a model: python -m gptjax.train --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE ...]"""

import gptjax.program  # noqa: F401  (first: it handles signals)
import os
import re
import sys

from absl import flags

from gptjax import config as configs
from gptjax.files import expanded
from gptjax.start import start
from gptjax.supervision import supervise

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run; an existing run is resumed')
_LOG_EVERY = flags.DEFINE_integer('log_every', 10, 'steps between logged lines', lower_bound=1)
_STOP_AT = flags.DEFINE_integer(
  'stop_at', 0, 'save and end after this step, without changing the schedule; 0: the last step', lower_bound=0)
_PROFILE = flags.DEFINE_string('profile_steps', None, 'first and last step of a profiler trace, as 10:13')
_ACCEPT = flags.DEFINE_bool(
  'accept_changes', False, 'resume although the config differs from the one that the workdir was started with')
_HANG = flags.DEFINE_float(
  'hang_timeout', 1800, "seconds without a step, validation batch or save after which the stacks of all threads are written and the "
  'process ends; 0: never', lower_bound=0)
_RESTARTS = flags.DEFINE_integer(
  'max_restarts', 0, 'maximum number of restarts after crashes, as long as the run makes progress; 0: run without supervision',
  lower_bound=0)
_REWARDS = flags.DEFINE_string('reward_file', None, 'file of Python with functions (row, text) -> number for objective.rewards')
_PRINT = flags.DEFINE_bool('print_config', False, 'print the config with all overrides, and exit')


def main(config: configs.Config) -> int:
  if _PRINT.value:
    print(configs.describe(config))
    return 0
  if not _WORKDIR.value:
    raise configs.UserError('--workdir', _WORKDIR.value, 'the folder of the run')
  workdir = expanded(_WORKDIR.value, '--workdir')
  if not next(path for path in (workdir, *workdir.absolute().parents) if path.exists()).is_dir():
    raise configs.UserError('--workdir', str(workdir), 'a folder, not a file')
  profile = re.fullmatch(r'(\d+):(\d+)', _PROFILE.value or '')
  profile_steps = (int(profile[1]), int(profile[2])) if profile else None
  if _PROFILE.value is not None and not (profile_steps and 1 <= profile_steps[0] <= profile_steps[1]):
    raise configs.UserError('--profile_steps', _PROFILE.value, 'FIRST:LAST with 1 <= FIRST <= LAST, as 10:13')
  if _RESTARTS.value:
    # Done, a mistake, stopped on request.
    return supervise([sys.executable, '-m', 'gptjax.train', *_unsupervised(flags.FLAGS.read_flags_from_files(sys.argv[1:]))], workdir,
                     _RESTARTS.value, final=(0, 2, os.EX_TEMPFAIL))
  cache = start(config)
  from gptjax import training
  options = training.Options(workdir, cache, log_every=_LOG_EVERY.value, stop_at=_STOP_AT.value, profile_steps=profile_steps,
                             accept_changes=_ACCEPT.value, hang_timeout=_HANG.value,
                             reward_file=expanded(_REWARDS.value, '--reward_file') if _REWARDS.value else None)
  try:
    return training.train(config, options)
  except OSError as error:
    if mistake := configs.os_mistake(error):  # of the machine: a restart may succeed
      raise configs.Fault(str(mistake)) from error
    raise


def _unsupervised(arguments: list[str]) -> list[str]:
  """The arguments without --max_restarts=N, or --max_restarts N."""
  kept = [one for one in arguments if not re.match('--?max_restarts=', one)]
  at = next((index for index, one in enumerate(kept) if one in ('--max_restarts', '-max_restarts')), len(kept))
  return kept[:at] + kept[at + 2:]


def script() -> None:
  """The command gptjax-train."""
  configs.run(main)


if __name__ == '__main__':
  script()
