"""The parametric law of the loss, fitted to runs: its constants, the best model for a budget and predictions, all with intervals.

N are the parameters of a model, D the tokens that it is trained on, C the FLOPs of its training; losses are in nats per token.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from gptjax.config import UserError

DELTA = 1e-3
"""Residuals of the log loss above it count by their size, smaller ones by their square (arXiv:2203.15556, section 3.3)."""
LEAST = 6
"""runs: five of them determine the five constants exactly"""
SIZES = 3
"""different N, and different D: what two of them show is a power law with any E"""
CONFIDENCE = 0.95
"""of all intervals"""
_LEAST_EXPONENT = 0.01
"""A smaller one would make its term of the law a constant, as E is."""

Runs = Float[np.ndarray, ' R']
"""A figure of each run: N, D, C or loss."""


@dataclasses.dataclass(frozen=True)
class Law:
  """L(N, D) = E + A / N^alpha + B / D^beta (arXiv:2203.15556, equation 2)."""

  E: float
  """loss of an infinite model of infinite data, in nats per token"""
  A: float
  B: float
  alpha: float
  beta: float

  def loss(self, parameters: Runs, tokens: Runs) -> Runs:
    """Losses of models of N parameters after D tokens."""
    return self.E + self.A * parameters ** -self.alpha + self.B * tokens ** -self.beta

  @property
  def exponents(self) -> tuple[float, float]:
    """a and b: the best N grows as C^a, and the best D as C^b (equation 4)."""
    return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

  def optimum(self, compute: float) -> tuple[float, float]:
    """N and D with the lowest loss for C = 6 N D FLOPs (equation 4)."""
    a, b = self.exponents
    g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
    return g * (compute / 6) ** a, (compute / 6) ** b / g


@dataclasses.dataclass(frozen=True)
class Fit:
  """A law fitted to runs, and the same law fitted to resampled runs (the bootstrap), from which intervals follow."""

  law: Law
  objective: float
  """the sum that the law minimizes"""
  resampled: tuple[Law, ...]
  residuals: Runs
  """log(measured loss / fitted loss)"""

  def interval(self, figure: Callable[[Law], float]) -> tuple[float, float]:
    """The interval of a figure of the law, by the quantiles of the resampled laws."""
    return interval(np.array([figure(law) for law in self.resampled]))

  def prediction(self, parameters: float, tokens: float, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The loss of another model, and the interval in which a measurement of it is expected.

    Its width comes from the constants, by the resampled laws, and from the run itself, by the residuals; these are smaller than the noise
    by the five constants, which they are corrected for.
    """
    n, d = np.array([parameters], float), np.array([tokens], float)
    noise = self.residuals * np.sqrt(len(self.residuals) / (len(self.residuals) - 5))
    draws = np.random.default_rng(seed).choice(noise, len(self.resampled))
    losses = [law.loss(n, d)[0] * np.exp(draw) for law, draw in zip(self.resampled, draws)]
    return float(self.law.loss(n, d)[0]), interval(np.array(losses))


def interval(values: Float[np.ndarray, ' S']) -> tuple[float, float]:
  """The quantiles between which CONFIDENCE of some values lie."""
  low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
  return float(low), float(high)


def objective(constants: Float[np.ndarray, '5'], log_parameters: Runs, log_tokens: Runs, log_loss: Runs
              ) -> tuple[float, Float[np.ndarray, '5']]:
  """The sum over runs of the Huber loss of the log loss, which a fit minimizes, and its gradient.

  The constants are log A, log B, log E, alpha and beta: the log of the law is a log-sum-exp of its terms (arXiv:2203.15556, equation 3).
  """
  return _objective(constants, log_parameters, log_tokens, log_loss)


def _objective(constants, log_parameters, log_tokens, log_loss):  # a fit calls it so often that checks of types would take most of the time
  a, b, e, alpha, beta = constants
  terms = np.stack([a - alpha * log_parameters, b - beta * log_tokens, np.full_like(log_loss, e)])
  predicted = np.logaddexp.reduce(terms)
  slope = np.clip(predicted - log_loss, -DELTA, DELTA)
  value = np.sum(slope * (predicted - log_loss - slope / 2))
  by_term = np.exp(terms - predicted) * slope
  return float(value), np.array([*by_term.sum(axis=1), -by_term[0] @ log_parameters, -by_term[1] @ log_tokens])


def fit(parameters: Runs, tokens: Runs, loss: Runs, resamples: int = 1000, seed: int = 0) -> Fit:
  """Fits the law to runs, and again to as many random choices of them, with repetition, as `resamples` says.

  Raises a UserError for runs that do not determine it.
  """
  _check(parameters, tokens, loss)
  law = minimized(parameters, tokens, loss, _starts(parameters, tokens, loss))
  for name, value, variable in (('alpha', law.alpha, 'N'), ('beta', law.beta, 'D')):
    if value < 1.01 * _LEAST_EXPONENT:
      raise UserError(name, value, f'runs whose loss falls with {variable}, so that a law can be fitted')
  rng = np.random.default_rng(seed)
  start = dataclasses.replace(law, E=max(law.E, loss.min() / 10))  # near 0 the gradient for log E vanishes
  laws: list[Law] = []
  while len(laws) < resamples:
    rows = rng.integers(len(loss), size=len(loss))
    if min(len({*parameters[rows]}), len({*tokens[rows]})) >= SIZES and len({*rows}) >= LEAST - 1:
      laws.append(minimized(parameters[rows], tokens[rows], loss[rows], [start]))
  residuals = np.log(loss / law.loss(parameters, tokens))
  value, _ = objective(_constants(law), np.log(parameters), np.log(tokens), np.log(loss))
  return Fit(law, value, tuple(laws), residuals)


def minimized(parameters: Runs, tokens: Runs, loss: Runs, starts: Iterable[Law]) -> Law:
  """The law with the smallest objective that L-BFGS finds from some starts."""
  logs = [np.log(values) for values in (parameters, tokens, loss)]
  # In units of the geometric means of N and D, where log A and alpha, and log B and beta, hardly depend on each other.
  n, d = logs[0].mean(), logs[1].mean()
  centered = lambda constants: constants + np.array([-1, -1, 0, 0, 0]) * [constants[3] * n, constants[4] * d, 0, 0, 0]
  scaled = lambda constants: tuple(part / DELTA for part in _objective(constants, logs[0] - n, logs[1] - d, logs[2]))
  bounds = [(None, None)] * 3 + [(_LEAST_EXPONENT, None)] * 2
  options = {'maxiter': 2000, 'maxcor': 20, 'ftol': 1e-14, 'gtol': 1e-8}
  found = [minimize(scaled, centered(_constants(start)), jac=True, method='L-BFGS-B', bounds=bounds, options=options) for start in starts]
  a, b, e, alpha, beta = min(found, key=lambda one: one.fun).x
  return Law(*map(float, (np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta)))


def _constants(law: Law) -> Float[np.ndarray, '5']:
  return np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])


def _starts(parameters: Runs, tokens: Runs, loss: Runs) -> Iterable[Law]:
  """Laws from which a fit starts: all exact for the mean run, with much or little of its loss from E, N and D."""
  n, d, mean = (np.exp(np.log(values).mean()) for values in (parameters, tokens, loss))
  for alpha, beta, share in itertools.product((0.2, 0.6), (0.2, 0.6), (0.5, 0.9)):
    e = share * loss.min()
    yield Law(e, (mean - e) / 2 * n ** alpha, (mean - e) / 2 * d ** beta, alpha, beta)


def _check(parameters: Runs, tokens: Runs, loss: Runs) -> None:
  for name, values in (('N', parameters), ('D', tokens), ('loss', loss)):
    if len(wrong := values[~((0 < values) & (values < np.inf))]):
      raise UserError(name, float(wrong[0]), 'a finite number above 0')
  if len(loss) < LEAST:
    raise UserError('runs', len(loss), f'{LEAST} or more: the law has five constants')
  for name, values in (('N', parameters), ('D', tokens)):
    if (count := len({*values})) < SIZES:
      raise UserError(f'different {name}', count, f'{SIZES} or more')
