"""GPT-2's block, the same with one choice of the modern one, and the modern block; and the learning rates of both ends.

python -m gptjax.sweep --sweep=experiments/modern_block/sweep.py --out=sweeps/modern_block --workers=2
"""

from gptjax.sweeps import Point, Points, Sweep, chain, product, seeds, values

GPT2: Point = {
  'model.positions': 'learned', 'model.norm': 'layernorm', 'model.mlp': 'gelu', 'model.mlp_width': 0, 'model.qk_norm': 'none',
  'model.bias': True, 'model.tied': True, 'model.kv_heads': 0}
ENDS = 'GPT-2', 'modern'
RATES = 5e-3, 2.5e-3
"""learning rates of the ends: for each the best of its half, itself and its double, with one seed"""


def choices(mlp_width: int, kv_heads: int) -> dict[str, Point]:
  """The modern side of every choice, by name. `mlp_width`: the hidden features of a SwiGLU with the parameters of GPT-2's layer: 2/3 of
  the usual 4 times the width, since it has three matrices (arXiv:2002.05202)."""
  return {
    'rope': {'model.positions': 'rope'},
    'rmsnorm': {'model.norm': 'rmsnorm'},
    'swiglu': {'model.mlp': 'swiglu', 'model.mlp_width': mlp_width},
    'QK norm': {'model.qk_norm': 'head'},
    'no biases': {'model.bias': False},
    'untied head': {'model.tied': False},
    'grouped queries': {'model.kv_heads': kv_heads}}


def variants(chosen: dict[str, Point], rates: tuple[float, float]) -> dict[str, Point]:
  """All fields of each model by its name: GPT-2's block with none of the choices or one, at its rate; the modern block, at its own."""
  modern = {name: value for one in chosen.values() for name, value in one.items()}
  added = {f'+ {name}': GPT2 | one for name, one in chosen.items()}
  old, new = ({'optimizer.peak_lr': rate} for rate in rates)
  return {name: old | one for name, one in ({ENDS[0]: GPT2} | added).items()} | {ENDS[1]: new | modern}


def points(models: dict[str, Point], count: int) -> Points:
  """Every model with `count` seeds, one seed after another, and both ends with the first seed at half their rate and twice as much."""
  others = [models[end] | {'optimizer.peak_lr': factor * models[end]['optimizer.peak_lr']} for end in ENDS for factor in (0.5, 2)]
  return chain(product(values('seed', 0), others), product(seeds(count), list(models.values())))


MODELS = variants(choices(mlp_width=170, kv_heads=2), RATES)
"""of the small version"""


def get_sweep() -> Sweep:
  return Sweep('configs/experiment.py', points(MODELS, count=3))
