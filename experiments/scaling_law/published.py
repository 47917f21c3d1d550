"""Published laws of Chinchilla's runs, and why Kaplan et al. (arXiv:2001.08361) found another exponent than Hoffmann et al.

Pearce and Song (arXiv:2406.12907): Kaplan et al. counted parameters and FLOPs without embeddings, at sizes where these are most of a model.
"""

import numpy as np

from experiments.scaling_law.fit import Law

CHINCHILLA = Law(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
"""arXiv:2203.15556, appendix D.3, with the digits of its TeX source that arXiv:2404.10102 reports."""
EPOCH = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""A second fit to the same runs, read off a picture (arXiv:2404.10102, table 1)."""
OMEGA = 47_491.0
"""in parameters^(2/3): models of Chinchilla's shapes, with 32,000 ids, have N = n + OMEGA n^(1/3) parameters, n of them not embeddings"""
KAPLAN_COMPUTE = (10 ** 12.95, 10 ** 20.7)
"""FLOPs, without those of embeddings, of the best models of Kaplan's sizes, to which Pearce and Song fit their power law"""


def kaplan_exponent(law: Law, compute: tuple[float, float] = KAPLAN_COMPUTE, omega: float = OMEGA) -> float:
  """The exponent that Kaplan et al. would have found if the law holds: n grows as c^exponent, where n are the best model's parameters
  without embeddings and c = 6 n D its FLOPs without embeddings.

  It is the slope of a straight line through log n over log c between two budgets. The n that is best for c has A alpha N^-alpha dlog(N) /
  dlog(n) = B beta D^-beta.
  """
  n = np.geomspace(1, 1e14, 100_001)
  total = n + omega * n ** (1 / 3)
  share = (n + omega * n ** (1 / 3) / 3) / total  # dlog(N) / dlog(n)
  tokens = (law.A * law.alpha * share * total ** -law.alpha / (law.B * law.beta)) ** (-1 / law.beta)
  log_compute = np.log(6 * n * tokens)
  budgets = np.linspace(np.log(compute[0]), np.log(compute[1]), 1001)
  return float(np.polyfit(budgets, np.interp(budgets, log_compute, np.log(n)), 1)[0])
