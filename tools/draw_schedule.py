"""Shows when each stage of a pipeline works: python -m tools.draw_schedule --schedule=1F1B --stages=4 --microbatches=8"""

from pathlib import Path

from absl import flags

from gptjax import config as configs

_SCHEDULE = flags.DEFINE_enum('schedule', '1F1B', ['GPipe', '1F1B', 'Interleaved1F1B', 'ZBH1'], 'as in pipeline.schedule')
_STAGES = flags.DEFINE_integer('stages', 4, 'number of stages, mesh.pipe', lower_bound=2, upper_bound=64)
_MICROBATCHES = flags.DEFINE_integer('microbatches', 8, 'microbatches per step', lower_bound=1, upper_bound=1024)
_CHUNKS = flags.DEFINE_integer('chunks', None, 'chunks of layers per stage, pipeline.chunks; default: 2 for Interleaved1F1B, else 1',
                               lower_bound=1)
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture of it')


def main(_: object) -> None:
  from gptjax.files import writable
  from gptjax.sharding import make_schedule
  name, chunks = _SCHEDULE.value, _CHUNKS.value or (2 if _SCHEDULE.value == 'Interleaved1F1B' else 1)
  configs.PipelineConfig(name, chunks)  # raises the error of chunks for a schedule without them
  if _PICTURE.value and not _PICTURE.value.endswith('.png'):
    raise configs.UserError('--picture', _PICTURE.value, 'a file that ends in .png')
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  schedule = make_schedule(name, _STAGES.value, _MICROBATCHES.value, chunks)
  kept = schedule.peak
  of = '' if chunks == 1 else f' of a chunk ({kept / chunks:g} of a stage)'
  print(f'{schedule}\n\n{name}: {schedule.ticks} ticks, idle {schedule.bubble:.1%} of the time; activations of at most {kept} '
        f'microbatches{of} are kept')
  if picture:
    _draw(schedule, name, picture)


def _draw(schedule, name: str, path: Path) -> None:
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch, Rectangle

  from gptjax.files import save_figure
  colors = {'F': '#8fb8de', 'B': '#f2b880', 'W': '#b5d99c'}
  figure = Figure(figsize=(max(6.0, 0.22 * schedule.ticks), 1.2 + 0.45 * schedule.stages), layout='constrained')
  axes = figure.subplots()
  for tick, row in enumerate(schedule.table):
    for stage, one in enumerate(row):
      if one is not None:
        shade = 1 - 0.35 * one.chunk / schedule.chunks
        color = [int(colors[one.kind][i:i + 2], 16) / 255 * shade for i in (1, 3, 5)]
        axes.add_patch(Rectangle((tick, stage - 0.5), 1, 1, facecolor=color, edgecolor='white'))
        axes.text(tick + 0.5, stage, str(one.microbatch), ha='center', va='center', fontsize=7)
  axes.set(xlim=(0, schedule.ticks), ylim=(schedule.stages - 0.5, -0.5), xlabel='tick', ylabel='stage', yticks=range(schedule.stages),
           title=f'{name}: {schedule.ticks} ticks, bubble {schedule.bubble:.1%}, at most {schedule.peak} kept')
  words = {'F': 'forward', 'B': 'gradient of the input', 'W': 'gradients of weights'}
  axes.legend(handles=[Patch(color=colors[kind], label=f'{kind}: {words[kind]}') for kind in 'FBW'], loc='upper center',
              bbox_to_anchor=(0.5, -0.3), ncols=3, frameon=False, fontsize=8)
  save_figure(figure, path, dpi=150)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
