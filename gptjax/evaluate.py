"""Scores checkpoints of a trained model on held-out documents and on tasks.

  python -m gptjax.evaluate --workdir=DIR
  python -m gptjax.evaluate --workdir=DIR --step=all --tasks=lambada,piqa --task_data=FOLDER
"""

import gptjax.program  # noqa: F401  (first: it handles signals)
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax import distributed
from gptjax.config import TENSOR_AXIS, UserError
from gptjax.files import expanded, json_line, read_json, writable, write_atomic, write_results
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoints to score: latest, best (lowest validation loss), all, or steps, N,N,...')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 0, 'tensor parallel devices; 0: as in training if the devices allow it', lower_bound=0)
_BATCH = flags.DEFINE_integer('batch_size', 0, 'rows of full context length per batch; 0: as in training', lower_bound=0)
_SETS = flags.DEFINE_list(
  'sets', None, "documents to score instead of all of the run's sets: NAME of one of these, NAME=STORE (from tools.prepare_data with the "
  "run's tokenizer) or NAME=PATH of text, JSON lines or Parquet, for a run with examples with the same fields; none: no documents")
_TASKS = flags.DEFINE_list('tasks', [], "tasks of lm-evaluation-harness: lambada, piqa, or any other in --task_path or the harness")
_TASK_PATH = flags.DEFINE_string('task_path', 'configs/tasks', 'folder of task files (YAML)')
_TASK_DATA = flags.DEFINE_string('task_data', '', 'folder of the data of local tasks: lambada/lambada_test.jsonl, piqa/valid.jsonl, ...')
_LIMIT = flags.DEFINE_integer('limit', 0, 'maximum number of examples per task; 0: all', lower_bound=0)
_FEWSHOT = flags.DEFINE_integer(
  'num_fewshot', None, 'few-shot examples before each question of a task; default: as the task specifies', lower_bound=0)
_ADD_BOS = flags.DEFINE_enum('add_bos', 'auto', ['auto', 'true', 'false'], "whether every context of a task begins with the tokenizer's "
                              "bos; auto: as in transformers: for our tokenizers except GPT-2's, and for published ones that specify it")
_REWARDS = flags.DEFINE_list(
  'rewards', [], 'rewards of completions drawn for the prompts of examples, in place of their loss: exact, number, length or functions in '
  '--reward_file; default: those of a run with objective.kind=grpo')
_REWARD_FILE = flags.DEFINE_string('reward_file', None, 'file of Python with functions (row, text) -> number for --rewards')
_COMPLETIONS = flags.DEFINE_integer('completions', 8, 'completions drawn for each prompt with rewards', lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 0, 'maximum tokens of such a completion; 0: as in training, or 64', lower_bound=0)
_SAMPLES = flags.DEFINE_string('samples', None, 'file for the requests and responses of tasks, one JSON object per example')


def main(_) -> None:
  cache = start()
  import jax

  from gptjax import checkpoint, data, evaluation

  workdir = expanded(_WORKDIR.value, '--workdir')
  if _SAMPLES.value:
    writable(_SAMPLES.value, '--samples')
  restorer = checkpoint.Restorer(workdir, _MODEL_AXIS.value)
  steps = restorer.checkpoints.resolve_all(_STEP.value)
  held_out = data.open_held_out(workdir / 'data')
  sets, tags = evaluation.choose_sets([] if _SETS.value == ['none'] else _SETS.value, held_out, restorer.config.data.source, cache)
  if not sets and not _TASKS.value:
    raise UserError('--sets', _SETS.value, 'NAME=STORE or NAME=PATH, or --tasks: an imported model has no validation sets of its own')
  file, earlier, baselines, beside = workdir / ('evaluation.json' if len(steps) == 1 else 'evaluations.jsonl'), {}, {}, {}
  if distributed.is_primary():  # before work whose results could not be kept
    writable(file, '--workdir')
    earlier = read_json(file) if len(steps) == 1 and file.exists() else {}
    documents = {name: store for name, store in sets.items() if not store.weighted}
    baselines = data.compression_baselines(held_out.tokenizer, documents) if documents else {}
    beside = _beside(workdir, restorer.config.data, held_out, sets, tags) if held_out.labels and sets else {}
  records, samples = {}, []
  try:
    with jax.set_mesh(restorer.mesh):
      score = _documents(restorer, held_out.tokenizer, sets, tags, cache) if sets else lambda parameters: None
      answer = _tasks(restorer, held_out.tokenizer) if _TASKS.value else lambda parameters: (None, [])
      for step in steps:
        trained = restorer.restore(step)
        if distributed.is_primary():
          print(trained.description, file=sys.stderr)
        if scores := score(trained.parameters):
          records[step] = evaluation.record(step, scores, None, held_out.labels)
        results, asked = answer(trained.parameters)
        del trained  # frees the memory before the next one is loaded
        records[step] = evaluation.record(step, scores, results, held_out.labels)
        samples += [{'step': step, **one} for one in asked]
  finally:
    if records and distributed.is_primary():  # also if a later checkpoint or task fails
      _report(file, earlier, [*records.values()], samples, baselines, beside)


def _beside(workdir, config, held_out, sets, tags) -> dict[str, Any]:
  """The figures of the baselines of classifiers, by the names of scores."""
  from gptjax import data, evaluation
  groups = {**{name: [name] for name in sets}, **{f'tag/{tag}': names for tag, names in tags.items()}, evaluation.ALL_SETS: [*sets]}
  longest = 0 if config.long_examples == 'cut' else config.context  # longer ones are dropped
  return evaluation.class_baselines(data.NaiveBayes.load(workdir / 'data'), sets, groups, held_out.tokenizer, longest)


def _documents(restorer, tokenizer, sets, tags, cache) -> Callable[[Any], Any]:
  """Returns a function from parameters to the scores of the sets."""
  from gptjax import data, evaluation, training
  config = restorer.config
  rows = data.eval_rows(config.data, sets, cache)
  scorer: Any
  if _REWARDS.value or config.objective.kind == 'grpo':
    _check_sets(sets, 1, '--rewards' if _REWARDS.value else '--sets')
    scorer = _pass_scorer(restorer, tokenizer)
  else:
    if config.objective.kind == 'preference':
      _check_sets(sets, 3 if config.objective.loss == 'kto' else 2, '--sets')
    if config.objective.needs_reference:
      _add_references(restorer, rows)
    scorer = evaluation.Scorer(restorer.model, training.make_objective(config), restorer.mesh, _BATCH.value or config.microbatch_size)

  def score(parameters):
    with data.ProgressBar('documents', sum(one.count for one in rows.values()), 'rows', shown=distributed.is_primary()) as work:
      return scorer.sets(parameters, rows, tags, advance=work.advance)
  return score


def _check_sets(sets, parts: int, flag: str) -> None:
  """Raises a UserError for a set that is not of examples with so many parts."""
  kinds = {1: 'prompts with one answer each', 2: 'pairs of answers', 3: 'pairs of answers with mismatched parts'}
  for name, store in sets.items():
    if store.labels or store.parts != parts:
      raise UserError(flag, name, f'sets of {kinds[parts]}')


def _pass_scorer(restorer, tokenizer):
  """Scores sets by the completions that the model draws."""
  from gptjax import training
  config, objective = restorer.config, restorer.config.objective
  if config.model.classes:
    raise UserError('--rewards', _REWARDS.value, 'none for a run with objective.kind=classification, which draws no text')
  config = dataclasses.replace(config, batch_size=_BATCH.value, microbatches=1) if _BATCH.value else config
  if _REWARDS.value:
    objective = configs.ObjectiveConfig('grpo', rewards=tuple(map(configs.Reward, _REWARDS.value)),
                                        max_tokens=_MAX_TOKENS.value or (objective.max_tokens if objective.kind == 'grpo' else 64))
  elif _MAX_TOKENS.value:
    objective = dataclasses.replace(objective, max_tokens=_MAX_TOKENS.value)
  rewards = training.make_rewards(objective.rewards, expanded(_REWARD_FILE.value, '--reward_file') if _REWARD_FILE.value else None)
  return training.PassScorer(restorer.model, restorer.mesh, tokenizer, 0, config, objective, _COMPLETIONS.value, rewards)


def _add_references(restorer, rows) -> None:
  """Gives rows of pairs the log-probabilities of the reference in the workdir."""
  from gptjax import checkpoint, training
  with tempfile.TemporaryDirectory() as folder:
    reference = checkpoint.Restorer(restorer.checkpoints.directory.with_name(checkpoint.REFERENCE), restorer.mesh.shape[TENSOR_AXIS])
    parameters = reference.restore(reference.checkpoints.resolve('latest')).parameters
    training.write_columns(Path(folder), rows.values(), parameters, reference.model, restorer.mesh, 0,
                           _BATCH.value or restorer.config.microbatch_size, shared=False)
    training.use_columns(Path(folder), rows.values())
    for one in rows.values():
      one.layout.column.load()


def _tasks(restorer, tokenizer) -> Callable[[Any], tuple[Any, list]]:
  """Returns a function from parameters to the results of the tasks and their samples."""
  from gptjax.sharding import batch_shards
  try:
    from gptjax.evaluation.harness import HarnessModel
    from gptjax.evaluation.tasks import Tasks
  except ModuleNotFoundError as error:
    raise UserError('--tasks', ','.join(_TASKS.value), f'{error.name} to be installed: pip install -r requirements-eval.txt') from None
  tasks = Tasks(_TASKS.value, _TASK_PATH.value, _TASK_DATA.value, _LIMIT.value, _FEWSHOT.value)
  tokens = (_BATCH.value or restorer.config.microbatch_size) * restorer.config.data.context
  if not _BATCH.value:  # most requests are far shorter than the context
    tokens = min(tokens, 2**14 * batch_shards(restorer.mesh))
  model = HarnessModel(restorer.model, restorer.mesh, tokenizer, tokens, {'auto': None, 'true': True, 'false': False}[_ADD_BOS.value])

  def answer(parameters):
    model.use(parameters)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints to stdout
      found = tasks(model, samples=bool(_SAMPLES.value))
    model.use({})
    return found
  return answer


def _report(file: Path, earlier: dict[str, Any], records: list[dict[str, Any]], samples: list[dict[str, Any]],
            baselines: dict[str, float], beside: dict[str, Any]) -> None:
  """Prints and writes the results: evaluation.json for one checkpoint, evaluations.jsonl and evaluation.png for several, and, of classes,
  confusion.png for the last."""
  from gptjax import evaluation
  if table := evaluation.table(records):
    print(table)
  if beside:
    figures = [evaluation.documents(record) for record in records]
    print(*(evaluation.class_table(record['step'], one, beside) for record, one in zip(records, figures)), sep='\n')
    evaluation.draw_confusion(figures[-1], file.with_name('confusion.png'))
  for name, bits in baselines.items():
    print(f'{name} of the same documents: {bits:.4f} bits per byte')
  for record in records:
    print(json_line(record))
  sys.stdout.flush()
  if _SAMPLES.value:
    plain = lambda value: value.tolist() if hasattr(value, 'tolist') else str(value)  # some metrics return numpy values
    write_results(expanded(_SAMPLES.value), ''.join(json.dumps(one, default=plain) + '\n' for one in samples))
  lines = [json_line(record | ({'baselines': baselines} if 'sets' in record else {})
                     | ({'class_baselines': beside} if beside else {})) for record in records]
  if file.suffix == '.json':
    # Earlier results of the same checkpoint that this evaluation did not repeat, such as documents besides tasks, are kept.
    kept = earlier if earlier.get('step') == records[0]['step'] else {}
    kept = {name: value for name, value in kept.items() if name == 'tasks'} if 'sets' in records[0] else kept
    merged = kept | json.loads(lines[0])
    write_atomic(file, json_line(merged) + '\n')
  else:
    write_atomic(file, '\n'.join(lines) + '\n')
    evaluation.draw(records, file.with_name('evaluation.png'))


def script() -> None:
  """The command gptjax-evaluate."""
  configs.run(main, needs_config=False)


if __name__ == '__main__':
  script()
