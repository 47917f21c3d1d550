"""Loss and gradient noise scale by batch size: python -m experiments.batch_size.analyse --trials=CSV --picture=PNG

`--out`, the folder of the sweep, writes noise.csv beside --trials anew: means of the measured ingredients over twentieths of each run.
"""

from absl import flags

from experiments import runs
from experiments.batch_size.report import NOISE, averaged, checked, compared, draw
from gptjax import config as configs
from gptjax.files import expanded, writable

_TRIALS = flags.DEFINE_string('trials', None, "the sweep's trials.csv, with noise.csv beside it", required=True)
_OUT = flags.DEFINE_string('out', None, "the sweep's folder, to write noise.csv from")
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')


def main(_: object) -> None:
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  path = expanded(_TRIALS.value, '--trials')
  found = runs.read(path)
  if _OUT.value:
    curves = runs.logged(expanded(_OUT.value, '--out'), found, NOISE)
    runs.write_curves(path.with_name('noise.csv'), {trial: averaged(lines) for trial, lines in curves.items()}, NOISE)
  noise = runs.read_curves(path.with_name('noise.csv'), found, NOISE)
  print('\n\n'.join([compared(found, noise), checked(found)]))
  if picture:
    draw(found, noise, picture)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
