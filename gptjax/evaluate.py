"""Scores a trained model's checkpoints on held-out documents and on tasks.

  python -m gptjax.evaluate --workdir=DIR
  python -m gptjax.evaluate --workdir=DIR --step=all --tasks=lambada,piqa --task_data=FOLDER
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax import distributed
from gptjax.config import UserError
from gptjax.files import expanded, json_line, read_json, write_atomic
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoints to score: latest, best (lowest validation loss), all, or steps, N,N,...')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 0, 'devices that share each matrix; 0: as in training, where the devices here allow it', lower_bound=0)
_BATCH = flags.DEFINE_integer('batch_size', 0, 'rows of a whole context scored together; 0: as many as in training', lower_bound=0)
_SETS = flags.DEFINE_list(
  'sets', None, "documents to score instead of the run's own sets: NAME of one of these, NAME=STORE (tools.prepare_data with the run's "
  'tokenizer) or NAME=PATH of text, JSON lines or Parquet; none: no documents')
_TASKS = flags.DEFINE_list('tasks', [], "tasks of lm-evaluation-harness: lambada, piqa, or any in --task_path or of the harness's own")
_TASK_PATH = flags.DEFINE_string('task_path', 'configs/tasks', 'folder of task files (YAML)')
_TASK_DATA = flags.DEFINE_string('task_data', '', 'folder that local tasks read: lambada/lambada_test.jsonl, piqa/valid.jsonl, ...')
_LIMIT = flags.DEFINE_integer('limit', 0, 'most examples of each task; 0: all', lower_bound=0)
_FEWSHOT = flags.DEFINE_integer(
  'num_fewshot', None, 'solved examples before each question of a task; default: as the task says', lower_bound=0)
_ADD_BOS = flags.DEFINE_enum('add_bos', 'auto', ['auto', 'true', 'false'], "whether every context of a task begins with the tokenizer's "
                              "bos; auto: where transformers puts one: with ours but GPT-2's, and with published ones that ask for it")
_SAMPLES = flags.DEFINE_string('samples', None, 'file for what tasks asked and what was answered, a JSON object an example')


def main(_) -> None:
  cache = start()
  import jax

  from gptjax import checkpoint, data, evaluation

  workdir = expanded(_WORKDIR.value)
  if _SAMPLES.value and not (folder := expanded(_SAMPLES.value).absolute().parent).is_dir():
    raise UserError('--samples', _SAMPLES.value, f'a file in a folder that is there; {folder} is not')
  with checkpoint.Restorer(workdir, _MODEL_AXIS.value) as restorer:
    steps = restorer.steps(_STEP.value)
    held_out = data.open_held_out(workdir / 'data')
    sets, tags = evaluation.choose_sets([] if _SETS.value == ['none'] else _SETS.value, held_out, cache)
    if not sets and not _TASKS.value:
      raise UserError('--sets', _SETS.value, 'NAME=STORE or NAME=PATH, or --tasks: the run, as an imported model, has no sets of its own')
    with jax.set_mesh(restorer.mesh):
      score, answer = _documents(restorer, sets, tags), _tasks(restorer, held_out.tokenizer)
      records, samples = [], []
      for step in steps:
        trained = restorer.restore(step)
        if distributed.is_primary():
          print(trained.description, file=sys.stderr)
        scores = score(trained.parameters)
        results, asked = answer(trained.parameters)
        del trained  # before the next one comes
        records.append(evaluation.record(step, scores, results))
        samples += [{'step': step, **one} for one in asked]
  if distributed.is_primary():
    _tell(workdir, records, samples, data.compression_yardsticks(held_out.tokenizer, sets) if sets else {})


def _documents(restorer, sets, tags) -> Callable[[Any], Any]:
  """A function of parameters: the scores of the sets, None where there are none."""
  if not sets:
    return lambda parameters: None
  from gptjax import data, evaluation, training
  from gptjax.sharding import row_groups
  config = restorer.config.data
  rows = {name: data.EvalRows(store, config.context, config.isolate_documents) for name, store in sets.items()}
  shared = row_groups(restorer.mesh)
  scorer = evaluation.Scorer(restorer.model, training.next_token(), restorer.mesh, -(-_rows(restorer) // shared) * shared)

  def score(parameters):
    with _watched('documents', sum(one.count for one in rows.values()), 'rows') as advance:
      return scorer.sets(parameters, rows, tags, advance=advance)
  return score


def _tasks(restorer, tokenizer) -> Callable[[Any], tuple[Any, list]]:
  """A function of parameters: the results of the tasks and their samples, (None, []) where there are none."""
  if not _TASKS.value:
    return lambda parameters: (None, [])
  try:
    from gptjax.evaluation import harness
    from gptjax.evaluation.tasks import Options, Tasks
  except ModuleNotFoundError as error:
    raise UserError('--tasks', ','.join(_TASKS.value), f'a machine with {error.name}: pip install -r requirements-eval.txt') from None
  tasks = Tasks(_TASKS.value, Options(_TASK_PATH.value, _TASK_DATA.value, _LIMIT.value, _FEWSHOT.value))
  model = harness.HarnessModel(restorer.model, restorer.mesh, tokenizer, _task_tokens(restorer),
                               {'auto': None, 'true': True, 'false': False}[_ADD_BOS.value], _watched)

  def answer(parameters):
    model.use(parameters)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints there
      found = tasks(model, samples=bool(_SAMPLES.value))
    model.use(None)
    return found
  return answer


def _task_tokens(restorer) -> int:
  """Tokens of a batch of a task's requests, most of which are far shorter than the context."""
  whole = _rows(restorer) * restorer.config.data.context
  from gptjax.sharding import row_groups
  shared = row_groups(restorer.mesh)
  return whole if _BATCH.value else min(whole, 2**14 * shared)


def _rows(restorer) -> int:
  return _BATCH.value or restorer.config.microbatch_size


@contextlib.contextmanager
def _watched(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
  """Shows the progress of long work."""
  from gptjax.data.progress import Work
  if not distributed.is_primary():
    yield lambda done: None
    return
  with Work(title, total, unit) as work:
    yield work.advance


def _tell(workdir: Path, records: list[dict[str, Any]], samples: list[dict[str, Any]], yardsticks: dict[str, float]) -> None:
  """Prints and keeps what was found: evaluation.json of one checkpoint; of several evaluations.jsonl and evaluation.png."""
  from gptjax import evaluation
  kept = [json_line(record | ({'yardsticks': yardsticks} if 'sets' in record else {})) for record in records]
  if len(records) == 1:
    file = workdir / 'evaluation.json'
    earlier = read_json(file) if file.exists() else {}
    if not isinstance(earlier, dict):
      raise UserError(str(file), earlier, 'the JSON object of an earlier evaluation; remove it')
    # What this one left out, such as the documents beside tasks, stays if it is of the same checkpoint.
    whole = (earlier if earlier.get('step') == records[0]['step'] else {}) | json.loads(kept[0])
    write_atomic(file, json_line(whole) + '\n')
  else:
    write_atomic(workdir / 'evaluations.jsonl', '\n'.join(kept) + '\n')
    partial = workdir / 'evaluation.partial.png'
    if evaluation.draw(records, partial):
      partial.rename(workdir / 'evaluation.png')
  if table := evaluation.table(records):
    print(table)
  for name, bits in yardsticks.items():
    print(f'{name} of the same documents: {bits:.4f} bits per byte')
  for record in records:
    print(json_line(record))
  if _SAMPLES.value:
    plain = lambda value: value.tolist() if hasattr(value, 'tolist') else str(value)  # numpy's, as some metrics have them
    write_atomic(expanded(_SAMPLES.value), ''.join(json.dumps(one, default=plain) + '\n' for one in samples))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
