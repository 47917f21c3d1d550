"""Sweeps: variations of a recipe, run by workers that share a folder.

A file of a sweep has `get_sweep() -> Sweep`, whose points are made with the functions here.
"""

from gptjax.sweeps.points import (
  Choice, LogUniform, Point, Points, Uniform, chain, defaults, draws, product, sample, seeds, unique, values, zipped)
from gptjax.sweeps.queue import Queue
from gptjax.sweeps.results import Status, status_of, write_table
from gptjax.sweeps.trials import Adaptive, Halving, Sweep, Trial, load_sweep, make_trials
from gptjax.sweeps.worker import Worker, of_other_code, places
