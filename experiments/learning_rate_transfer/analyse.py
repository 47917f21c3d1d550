"""Best peak learning rates by width: python -m experiments.learning_rate_transfer.analyse --trials=FILE.csv --picture=FILE.png

It prints the loss at every rate, the best rate of every width, and what a width loses at the best rate of the narrowest one; and draws
the losses.
"""

from absl import flags

from gptjax import config as configs

_TRIALS = flags.DEFINE_string('trials', None, "a sweep's trials.csv", required=True)
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')


def main(_: object) -> None:
  if _PICTURE.value and not _PICTURE.value.endswith('.png'):
    raise configs.UserError('--picture', _PICTURE.value, 'a file that ends in .png')
  from experiments.learning_rate_transfer.rates import described, draw, losses
  from experiments.runs import read
  from gptjax.files import expanded, writable
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  found = losses(read(expanded(_TRIALS.value, '--trials')))
  print(described(found))
  if picture:
    draw(found, picture)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
