"""Tasks of EleutherAI's lm-evaluation-harness: finds them by name, loads their data and runs a model on them. Needs the lm_eval package."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from gptjax.config import UserError, shipped
from gptjax.files import expanded

_BOOTSTRAP_ITERATIONS = 100
"""For standard errors that have no formula, such as that of a perplexity."""

Results = dict[str, dict[str, Any]]
"""By task: its metrics, each with its standard error as METRIC_stderr, and examples, fewshot and version."""


class Tasks:
  """Tasks by name, with their data.

  Args:
    names: of tasks, tags or groups in `path`, or of the harness's own, whose data is downloaded.
    path: folder of YAML files; they take precedence over the harness's own tasks of the same name.
    data: folder with the data of local tasks.
    limit: maximum number of examples per task; 0: all.
    fewshot: few-shot examples before each question; None: as defined by the task.

  Raises:
    UserError: an unknown name, or data that cannot be loaded.
  """

  def __init__(self, names: Sequence[str], path: str = 'configs/tasks', data: str = '', limit: int = 0, fewshot: int | None = None):
    logging.getLogger('lm_eval').setLevel(logging.ERROR)
    self._limit = limit or None
    folder = shipped(expanded(path))
    if not folder.is_dir():
      raise UserError('--task_path', path, 'a folder of task files (YAML)')
    # A task's data_files and custom_dataset get the folder from its metadata.
    found = {'include_path': folder, 'metadata': {'task_data': str(expanded(data))} if data else {}}
    manager = TaskManager(include_defaults=False, **found)
    own = manager.all_tasks
    if not set(names) <= set(own):
      manager = TaskManager(**found)  # also the harness's own, thousands of files: this takes a while
    for name in names:
      if name not in manager.all_tasks:
        raise UserError('--tasks', name, f"{', '.join(own) or 'none'} in {path}, or one of the harness's own", manager.all_tasks)
    self._loaded: dict[str, dict[str, Any]] = {'tasks': {}, 'groups': {}, 'group_map': {}}
    for name in names:
      for part, members in _load(manager, name, data).items():
        self._loaded[part].update(members)
    for task in self._loaded['tasks'].values():
      _set_fewshot(task, fewshot)

  def __call__(self, model: LM, samples: bool = False) -> tuple[Results, list[dict[str, Any]]]:
    """Runs a model of the harness, such as HarnessModel or HFLM, on all tasks. Returns the results, and with `samples`, for each example,
    its task, doc_id, arguments, resps and metrics."""
    os.environ['DISABLE_MULTIPROC'] = '1'  # the harness would fork while JAX's threads run
    try:
      output = evaluator.evaluate(model, self._loaded, limit=self._limit, log_samples=samples, bootstrap_iters=_BOOTSTRAP_ITERATIONS)
    except UserError:
      raise
    except Exception as error:  # a task's own code may raise anything
      names = ', '.join(self._loaded['tasks'])
      raise UserError('--tasks', names, f'tasks whose code runs on their data ({type(error).__name__}: {error})') from error
    assert output is not None
    kept = ('doc_id', 'arguments', 'resps', 'filter', 'target')
    examples = [{'task': name, **{key: sample[key] for key in (*kept, *sample['metrics'])}}
             for name, some in (output.get('samples') or {}).items() for sample in some]
    return {name: _result(name, metrics, output) for name, metrics in output['results'].items()}, examples


def _load(manager: TaskManager, name: str, data: str) -> dict[str, Any]:
  try:
    return dict(manager.load(name))
  except FileNotFoundError as error:
    raise UserError('--task_data', data or None, f'a folder with the data of {name} ({error.filename or error})') from None
  except Exception as error:  # a task file, its code or a download may raise anything
    raise UserError('--tasks', name, f'a task that can be loaded ({type(error).__name__}: {error})') from error


def _set_fewshot(task: Any, fewshot: int | None) -> None:
  """Sets the number of few-shot examples as the harness's command line does: a task that is defined with 0 keeps 0."""
  defined = task.get_config('num_fewshot')
  if defined is None or (fewshot is not None and defined != 0):
    task.set_config(key='num_fewshot', value=fewshot or 0)
  task.set_fewshot_seed(seed=1234)


def _result(name: str, metrics: dict[str, Any], output: Any) -> dict[str, Any]:
  numbers = {}
  for key, value in metrics.items():
    # 'acc,none' is the metric acc after the filter none, 'acc_stderr,none' its standard error.
    metric, _, filtered = key.partition(',')
    if filtered and isinstance(value, int | float):
      of = metric.removesuffix('_stderr') + ('' if filtered == 'none' else f',{filtered}')
      numbers[of + '_stderr' * metric.endswith('_stderr')] = float(value)
  examples = output.get('n-samples', {}).get(name, {}).get('effective')
  return numbers | {'examples': examples, 'fewshot': output.get('n-shot', {}).get(name), 'version': output.get('versions', {}).get(name)}
