"""Scores a trained model on its held-out documents: python -m gptjax.evaluate --workdir=DIR"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from gptjax import config as configs
from gptjax import processes
from gptjax.files import json_line, write_whole
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to score: latest, best (lowest validation loss), or a step')


def main(_) -> None:
  start()
  import jax
  from rich.console import Console
  from rich.progress import Progress

  from gptjax import checkpoint, data, evaluation, training

  workdir = Path(_WORKDIR.value).expanduser()
  trained = checkpoint.load_trained(workdir, _STEP.value)
  if processes.first():
    print(trained.description, file=sys.stderr)
  held_out = data.open_held_out(workdir / 'data')
  if not held_out.valid:
    raise configs.UserError('--workdir', str(workdir), 'a run with validation documents; an imported model has none')
  config = trained.config
  sets = {name: data.EvalRows(store, config.data.context, config.data.isolate_documents) for name, store in held_out.valid.items()}
  devices = trained.mesh.shape['replica'] * trained.mesh.shape['data']
  console = Console(stderr=True)
  shown = console.is_terminal and processes.first()
  with jax.set_mesh(trained.mesh), Progress(console=console, transient=True, disable=not shown) as bar:
    scorer = evaluation.Scorer(trained.blueprint, training.next_token(), trained.mesh, -(-config.sequences // devices) * devices)
    task = bar.add_task('rows', total=sum(rows.count for rows in sets.values()))
    scores = scorer.sets(trained.parameters, sets, held_out.tags, advance=lambda count: bar.advance(task, count))
  if not processes.first():
    return
  result = {**dataclasses.asdict(scores.overall), 'step': trained.step}
  if len(sets) > 1:
    _print(scores.named())
  for group in ('sets', 'tags'):
    result[group] = {name: dataclasses.asdict(score) for name, score in getattr(scores, group).items()}
  yardsticks = data.compression_yardsticks(held_out.tokenizer, held_out.valid)
  write_whole(workdir / 'evaluation.json', json_line(result | {'yardsticks': yardsticks}) + '\n')
  for name, bits in yardsticks.items():
    print(f'{name} of the same documents: {bits:.4f} bits per byte')
  print(json_line(result))


def _print(scores: dict) -> None:
  print(f'{"set":<24}{"loss":>10}{"perplexity":>14}{"bits/byte":>12}{"tokens":>14}')
  for name, score in scores.items():
    print(f'{name:<24}{score.loss:>10.4f}{score.perplexity:>14.3f}{score.bits_per_byte:>12.4f}{score.tokens:>14,}')


if __name__ == '__main__':
  configs.run(main, needs_config=False)
