"""Tasks of EleutherAI's lm-evaluation-harness: found by name, their data loaded, a model put to them. Needs the lm_eval package."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from gptjax.config import UserError
from gptjax.files import expanded

_RESAMPLES = 100
"""For standard errors that have no formula, such as that of a perplexity."""

Results = dict[str, dict[str, Any]]
"""Of each task by name: its metrics, each with its standard error as METRIC_stderr, examples, fewshot and version."""


@dataclasses.dataclass(frozen=True)
class Options:
  """How tasks are put."""

  path: str = 'configs/tasks'
  """folder of YAML files, which go before the harness's own tasks of the same name"""
  data: str = ''
  """folder that local tasks read"""
  limit: int = 0
  """most examples of each task; 0: all"""
  fewshot: int | None = None
  """solved examples before each question; None: as the task says"""


class Tasks:
  """Tasks by name, with their data.

  Args:
    names: of tasks, tags or groups: those below `options.path` first, then the harness's own, whose data is downloaded.
    options: how they are put.

  Raises:
    UserError: a name that nothing has, or data that cannot be loaded.
  """

  def __init__(self, names: Sequence[str], options: Options):
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    self._limit = options.limit or None
    if not expanded(options.path).is_dir():
      raise UserError('--task_path', options.path, 'a folder of task files (YAML)')
    local = expanded(options.path)
    # A task's data_files and loaders get the folder through its metadata.
    found = {'include_path': local, 'metadata': {'task_data': str(expanded(options.data))} if options.data else {}}
    manager = TaskManager(include_defaults=False, **found)
    own = manager.all_tasks
    if not set(names) <= set(own):
      manager = TaskManager(**found)  # thousands, which take a while to be found
    for name in names:
      if name not in manager.all_tasks:
        raise UserError('--tasks', name, f"{', '.join(own) or 'none'} in {options.path}, or one of the harness's own", manager.all_tasks)
    self._loaded: dict[str, dict[str, Any]] = {'tasks': {}, 'groups': {}, 'group_map': {}}
    for name in names:
      for part, members in _load(manager, name, options).items():
        self._loaded[part].update(members)
    for task in self._loaded['tasks'].values():
      _put(task, options.fewshot)

  @property
  def examples(self) -> int:
    """Of all tasks together."""
    return sum(min(len(task.eval_docs), self._limit or len(task.eval_docs)) for task in self._loaded['tasks'].values())

  def __call__(self, model: LM, samples: bool = False) -> tuple[Results, list[dict[str, Any]]]:
    """Puts a model to all tasks.

    Args:
      model: any that the harness knows; a HarnessModel of ours, or its HFLM.
      samples: whether what was asked and answered is returned too.

    Returns:
      results, and of each example its task, doc_id, arguments, resps and metrics.
    """
    os.environ['DISABLE_MULTIPROC'] = '1'  # the harness would fork beside JAX's threads
    try:
      told = evaluator.evaluate(model, self._loaded, limit=self._limit, log_samples=samples, bootstrap_iters=_RESAMPLES)
    except UserError:
      raise
    except Exception as error:  # whatever a task's own code may raise
      names = ', '.join(self._loaded['tasks'])
      raise UserError('--tasks', names, f'tasks whose code runs on their data ({type(error).__name__}: {error})') from error
    assert told is not None
    kept = ('doc_id', 'arguments', 'resps', 'filter', 'target')
    asked = [{'task': name, **{key: sample[key] for key in (*kept, *sample['metrics'])}}
             for name, some in (told.get('samples') or {}).items() for sample in some]
    return {name: _result(name, metrics, told) for name, metrics in told['results'].items()}, asked


def _load(manager: TaskManager, name: str, options: Options) -> dict[str, Any]:
  try:
    return dict(manager.load(name))
  except FileNotFoundError as error:
    raise UserError('--task_data', options.data or None, f'a folder with the data of {name} ({error.filename or error})') from None
  except Exception as error:  # whatever a task file, its code or a download may raise
    raise UserError('--tasks', name, f'a task that can be loaded ({type(error).__name__}: {error})') from error


def _put(task: Any, fewshot: int | None) -> None:
  """Settles a task's few-shot examples as the harness's command line does: a task that says 0 keeps it."""
  said = task.get_config('num_fewshot')
  if said is None or (fewshot is not None and said != 0):
    task.set_config(key='num_fewshot', value=fewshot or 0)
  task.set_fewshot_seed(seed=1234)


def _result(name: str, metrics: dict[str, Any], told: Any) -> dict[str, Any]:
  numbers = {}
  for key, value in metrics.items():
    # 'acc,none' is the metric acc after the filter none, 'acc_stderr,none' its standard error.
    metric, _, which = key.partition(',')
    if which and isinstance(value, int | float):
      of = metric.removesuffix('_stderr') + ('' if which == 'none' else f',{which}')
      numbers[of + '_stderr' * metric.endswith('_stderr')] = float(value)
  examples = told.get('n-samples', {}).get(name, {}).get('effective')
  return numbers | {'examples': examples, 'fewshot': told.get('n-shot', {}).get(name), 'version': told.get('versions', {}).get(name)}
