"""Loss, steps and CPU time by optimizer: python -m experiments.optimizers.analyse --trials=CSV --picture=PNG

`--out`, the folder of the sweep, writes curves.csv beside --trials anew.
"""

from absl import flags

from experiments import runs
from experiments.optimizers.report import CURVE, compared, cost, draw, rates
from gptjax import config as configs
from gptjax.files import expanded, writable

_TRIALS = flags.DEFINE_string('trials', None, "the sweep's trials.csv, with curves.csv and cost.csv beside it", required=True)
_OUT = flags.DEFINE_string('out', None, "the sweep's folder, to write curves.csv from")
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')


def main(_: object) -> None:
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  path = expanded(_TRIALS.value, '--trials')
  found = runs.read(path)
  if _OUT.value:
    runs.write_curves(path.with_name('curves.csv'), runs.logged(expanded(_OUT.value, '--out'), found, CURVE), CURVE)
  curves = runs.read_curves(path.with_name('curves.csv'), found, CURVE)
  print('\n\n'.join([rates(found), compared(found, curves, cost(path.with_name('cost.csv')))]))
  if picture:
    draw(found, curves, picture)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
