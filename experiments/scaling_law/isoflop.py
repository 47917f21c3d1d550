"""IsoFLOP curves: the best model for each budget of compute, by a parabola through the losses of its runs (arXiv:2203.15556, section 3.2).

N are the parameters of a model, C the FLOPs of its training; losses are in nats per token.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from experiments.scaling_law.fit import Runs, interval

LEAST_MODELS = 4
"""of a budget: three determine its parabola exactly, so that they say nothing about its error"""
_APART = 1.1
"""Budgets differ by this factor or more; those of runs of one budget less, since runs end with a whole step."""


@dataclasses.dataclass(frozen=True)
class Budget:
  """The runs of about the same compute: loss = c0 x^2 + c1 x + c2, where x = log(N / center)."""

  compute: float
  """geometric mean, in FLOPs"""
  runs: Int[np.ndarray, ' r']
  """their places among all runs"""
  center: float
  curve: Float[np.ndarray, '3']
  best: float
  """N with the lowest loss; NaN if the curve has no minimum between the smallest and the largest model"""
  interval: tuple[float, float]
  """of `best`"""

  @property
  def has_minimum(self) -> bool:
    """Whether `best` is a number."""
    return not np.isnan(self.best)

  def loss(self, parameters: Float[np.ndarray, ' n']) -> Float[np.ndarray, ' n']:
    """The losses of the parabola."""
    return np.polyval(self.curve, np.log(parameters / self.center))


@dataclasses.dataclass(frozen=True)
class IsoFlop:
  """The budgets of some runs, and the power law N = G C^a through their best models."""

  budgets: list[Budget]
  exponent: float
  """a; NaN with fewer than two best models"""
  interval: tuple[float, float]
  """of a"""
  factor: float
  """G"""


def groups(compute: Runs) -> list[Int[np.ndarray, ' r']]:
  """The places of runs of the same budget, from the smallest budget on."""
  order = np.argsort(compute, kind='stable')
  cuts = np.flatnonzero(np.diff(np.log(compute[order])) >= np.log(_APART)) + 1
  return np.split(order, cuts)


def isoflop(parameters: Runs, compute: Runs, loss: Runs, resamples: int = 1000, seed: int = 0) -> IsoFlop:
  """The best models of all budgets with at least LEAST_MODELS different models, and the power law through them.

  Intervals come from the same curves with residuals of all budgets, drawn at random, in place of their own.
  """
  log_n = np.log(parameters)
  chosen = [runs for runs in groups(compute) if len({*parameters[runs]}) >= LEAST_MODELS]
  centers = [log_n[runs].mean() for runs in chosen]
  curves = [np.polyfit(log_n[runs] - center, loss[runs], 2) for runs, center in zip(chosen, centers)]
  fitted = [np.polyval(curve, log_n[runs] - center) for runs, center, curve in zip(chosen, centers, curves)]
  # Residuals of a parabola are smaller than the noise by its three constants.
  residuals = np.concatenate([(loss[runs] - one) * np.sqrt(len(runs) / (len(runs) - 3)) for runs, one in zip(chosen, fitted)] or [[]])
  rng, budgets, resampled = np.random.default_rng(seed), [], []
  for runs, center, curve, one in zip(chosen, centers, curves, fitted):
    drawn = np.polyfit(log_n[runs] - center, one[:, None] + rng.choice(residuals, (len(runs), resamples)), 2)
    best = center + _vertex(curve)
    if log_n[runs].min() <= best <= log_n[runs].max():
      resampled.append(center + _vertex(drawn))
      low, high = interval(np.exp(resampled[-1][np.isfinite(resampled[-1])]))
    else:
      best = low = high = np.nan
    mean = np.exp(np.log(compute[runs]).mean())
    budgets.append(Budget(float(mean), runs, float(np.exp(center)), curve, float(np.exp(best)), (low, high)))
  minima = [one for one in budgets if one.has_minimum]
  if len(minima) < 2:
    return IsoFlop(budgets, np.nan, (np.nan, np.nan), np.nan)
  logs = np.log([one.compute for one in minima])
  exponent, constant = np.polyfit(logs, np.log([one.best for one in minima]), 1)
  draws = np.stack(resampled)[:, np.isfinite(resampled).all(axis=0)]
  return IsoFlop(budgets, float(exponent), interval(np.polyfit(logs, draws, 1)[0]), float(np.exp(constant)))


def _vertex(curve: Float[np.ndarray, '3 ...']) -> Float[np.ndarray, '...']:
  """Where parabolas have their minimum; NaN for those that open downwards."""
  return np.where(curve[0] > 0, -curve[1] / (2 * np.where(curve[0] > 0, curve[0], 1)), np.nan)
