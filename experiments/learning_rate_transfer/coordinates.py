"""The coordinate check of muP: python -m experiments.learning_rate_transfer.coordinates --picture=FILE.png

It prints how much activations change in the first steps, by width, in standard parametrization and with muP, and draws it.
"""

from absl import flags

from gptjax import config as configs

_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')
_SEEDS = flags.DEFINE_integer('seeds', 8, 'initial values to average over', lower_bound=1)


def main(_: object) -> None:
  if _PICTURE.value and not _PICTURE.value.endswith('.png'):
    raise configs.UserError('--picture', _PICTURE.value, 'a file that ends in .png')
  import jax
  jax.config.update('jax_platforms', 'cpu')
  from experiments.learning_rate_transfer.activations import KINDS, described, draw, measured
  from experiments.learning_rate_transfer.sweep import WIDTHS
  from gptjax.files import writable
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  found = {kind: measured(mup, WIDTHS, _SEEDS.value) for kind, mup in KINDS.items()}
  print(described(found))
  if picture:
    draw(found, picture)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
