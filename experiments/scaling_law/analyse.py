"""The scaling law of a sweep: python -m experiments.scaling_law.analyse --trials=FILE.csv --recipe=FILE

It counts parameters and FLOPs of the runs, fits the law and the IsoFLOP curves, prints both with intervals, and draws them. `--predict`
adds the loss of a run that is not in the sweep: the recipe with other values of some fields.
"""

import json

from absl import flags

from gptjax import config as configs

_TRIALS = flags.DEFINE_string('trials', None, 'CSV file of a sweep', required=True)
_RECIPE = flags.DEFINE_string('recipe', None, 'recipe of the sweep, or config.json of one of its trials', required=True)
_LOSS = flags.DEFINE_string('loss', 'eval/valid/loss', 'column with the loss, in nats per token')
_LEAST_STEPS = flags.DEFINE_integer('least_steps', 1, 'shorter runs are left out: to what they learn first no law applies', lower_bound=1)
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')
_PREDICT = flags.DEFINE_string(
  'predict', None, """run to predict, with all fields that the sweep varies: '{"model.width": 256, "steps": 4000}'""")
_RESAMPLES = flags.DEFINE_integer('resamples', 1000, 'random choices of the runs, from which intervals follow', lower_bound=40)
_SEED = flags.DEFINE_integer('seed', 0, 'of these choices', lower_bound=0)


def main(_: object) -> None:
  if _PICTURE.value and not _PICTURE.value.endswith('.png'):
    raise configs.UserError('--picture', _PICTURE.value, 'a file that ends in .png')
  if not configs.shipped(_RECIPE.value).is_file():
    raise configs.UserError('--recipe', _RECIPE.value, 'a recipe, such as configs/default.py')
  import jax
  jax.config.update('jax_platforms', 'cpu')  # models are counted, not computed
  from experiments.scaling_law.fit import fit
  from experiments.scaling_law.isoflop import isoflop
  from experiments.scaling_law.report import described, draw
  from experiments.scaling_law.trials import counted, read
  from gptjax.files import expanded, json_object, writable
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  recipe = configs.load(_RECIPE.value)
  runs = read(expanded(_TRIALS.value, '--trials'), recipe, _LOSS.value, _LEAST_STEPS.value)
  fields = json_object('--predict', _PREDICT.value) if _PREDICT.value else None
  if fields is not None and (missing := [name for name in runs.fields if name not in fields]):
    raise configs.UserError('--predict', _PREDICT.value, f'a value for every field that the sweep varies; not there: {", ".join(missing)}')
  wanted = None if fields is None else counted(configs.override(recipe, fields, '--predict: '), '--predict')
  found = fit(runs.parameters, runs.tokens, runs.loss, _RESAMPLES.value, _SEED.value)
  curves = isoflop(runs.parameters, runs.compute, runs.loss, _RESAMPLES.value, _SEED.value)
  print(described(runs, found, curves))
  if picture:
    draw(runs, found, curves, picture)
  if wanted:
    parameters, tokens, compute = wanted
    loss, (low, high) = found.prediction(parameters, tokens, _SEED.value)
    print(f'\nprediction, for {compute / runs.compute.max():.3g} times the FLOPs of the largest run')
    print(json.dumps({'fields': fields, 'parameters': int(parameters), 'tokens': int(tokens), 'flops': int(compute),
                      _LOSS.value: round(loss, 4), 'low': round(low, 4), 'high': round(high, 4)}))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
