"""Scores a trained model on its held-out documents: python -m gptjax.evaluate --workdir=DIR"""

import dataclasses
import sys
from pathlib import Path

from absl import flags

from gptjax import config as configs
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
  print(trained.description, file=sys.stderr)
  held_out = data.open_held_out(workdir / 'data')
  config = trained.config
  rows = data.EvalRows(held_out.valid, config.data.context)
  devices = trained.mesh.shape['data']
  console = Console(stderr=True)
  with jax.set_mesh(trained.mesh), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
    scorer = evaluation.Scorer(trained.blueprint, training.next_token(), rows, trained.mesh,
                               batch_size=-(-config.sequences // devices) * devices,
                               isolate_documents=config.data.isolate_documents)
    task = bar.add_task('rows', total=rows.count)
    score = scorer(trained.parameters, advance=lambda count: bar.advance(task, count))
  result = {**dataclasses.asdict(score), 'step': trained.step}
  yardsticks = data.compression_yardsticks(held_out)
  write_whole(workdir / 'evaluation.json', json_line(result | {'yardsticks': yardsticks}) + '\n')
  for name, bits in yardsticks.items():
    print(f'{name} of the same documents: {bits:.4f} bits per byte')
  print(json_line(result))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
