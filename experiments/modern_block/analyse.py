"""What each choice of a block buys: python -m experiments.modern_block.analyse --trials=CSV --picture=PNG"""

from pathlib import Path

from absl import flags
from matplotlib.figure import Figure

from experiments.modern_block.sweep import ENDS, MODELS, points
from experiments.runs import Groups, Interval, label, read, table, told
from gptjax import config as configs
from gptjax.files import expanded, save_figure, writable
from gptjax.sweeps import Point

_TRIALS = flags.DEFINE_string('trials', None, "the small sweep's trials.csv", required=True)
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')
_RECIPE = 'configs/experiment.py'
_LOSS = 'eval/valid/loss'


def main(_: object) -> None:
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  runs = Groups(read(expanded(_TRIALS.value, '--trials')))
  print('\n\n'.join([rates(runs), models(runs)]))
  if picture:
    draw(runs, picture)


def counted(point: Point) -> tuple[int, float]:
  """Parameters of a model, and FLOPs per token of its training."""
  from gptjax.data.tokenizers import ByteTokenizer
  from gptjax.model import flops_per_token, parameter_count
  config = configs.override(configs.load(_RECIPE), {'model.vocab_size': ByteTokenizer().vocab_size} | point)
  return parameter_count(config.model, config.data.context), flops_per_token(config.model, config.data.context)


def changes(runs: Groups) -> dict[str, Interval]:
  """How much more loss, in nats per byte, every model has than GPT-2's block with the same seed."""
  base, *others = MODELS
  return {name: runs.difference(label(MODELS[name]), label(MODELS[base]), _LOSS) for name in others}


def rates(runs: Groups) -> str:
  """The losses of both ends with the first seed, by rate."""
  rows = []
  for end in ENDS:
    ours = {name: value for name, value in MODELS[end].items() if name != 'optimizer.peak_lr'}
    tried = sorted({point['optimizer.peak_lr'] for point in points(MODELS, 1) if ours.items() <= point.items()})
    rows += [[end, f'{rate:g}', f'{runs[label(MODELS[end] | {"optimizer.peak_lr": rate})][0].metrics[_LOSS]:.4f}'] for rate in tried]
  return table(['model', 'learning rate', 'loss, seed 0'], rows)


def models(runs: Groups) -> str:
  """Sizes and losses of all models; changes in bold if their interval does not include 0."""
  changed, rows = changes(runs), []
  for name, point in MODELS.items():
    parameters, flops = counted(point)
    mean, half = changed.get(name, (0.0, 0.0))
    words = f'{mean:+.4f} ± {half:.4f}' if name in changed else ''
    rows.append([name, f'{parameters:,}', f'{flops / 1e3:.0f}', told(runs.mean(label(point), _LOSS)),
                 f'**{words}**' if abs(mean) > half else words])
  return table(['model', 'parameters', 'kFLOPs per token', 'loss', 'change'], rows)


def draw(runs: Groups, path: Path) -> None:
  """Writes a PNG with the changes and their intervals."""
  figure = Figure(figsize=(9, 3.6), layout='constrained')
  axes, changed = figure.subplots(), changes(runs)
  for place, (mean, half) in enumerate(changed.values()):
    axes.errorbar(mean, place, xerr=half, fmt='o', markersize=5, capsize=3, color='tab:blue' if abs(mean) > half else 'gray')
  axes.axvline(0, color='black', linewidth=0.8)
  axes.set_xlabel("loss beyond that of GPT-2's block, nats per byte: left of 0 is better; gray: the interval includes 0")
  axes.set_yticks(range(len(changed)), list(changed))
  axes.invert_yaxis()
  axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path, dpi=100)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
