"""Checkpoints of a run are scored one after another with the same programs, on any mesh."""

import jax
import numpy as np
import pytest

from small_stores import make_store

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress, Restorer, Retention
from gptjax.config import ComputeConfig, Config, DataConfig, ModelConfig, UserError
from gptjax.data import EvalRows
from gptjax.evaluation import LikelihoodScorer, Request, Scorer
from gptjax.model import abstract_model
from gptjax.training import next_token
from gptjax.compilations import CompileCounter

MODEL = ModelConfig(layers=1, width=32, heads=4, vocab_size=259)
ASKED = [Request([1, 20, 30], [40, 50]), Request([1], [60] * 12)]


@pytest.fixture
def workdir(tmp_path):
  """A run's folder with checkpoints of steps 3, 5 and 8, the second of them the best."""
  (tmp_path / 'config.json').write_text(configs.to_json(Config(model=MODEL, data=DataConfig(context=16))))
  checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention(latest=3))
  for step, loss in ((3, 2.0), (5, 1.0), (8, 3.0)):
    rng = np.random.default_rng(step)
    shapes = abstract_model(MODEL, ComputeConfig(), 16).shapes
    parameters = {name: 0.2 * rng.standard_normal(s.shape, np.float32) for name, s in shapes.items()}
    checkpoints.save(Progress(step), {'trained': parameters, 'step': np.array(step)}, loss)
  checkpoints.close()
  return tmp_path


def test_steps_are_selected_by_names_and_numbers(workdir):
  checkpoints = Restorer(workdir).checkpoints
  for wanted, steps in (('all', [3, 5, 8]), ('latest', [8]), ('best', [5]), ('8, 3', [3, 8]), ('best,5,latest', [5, 8])):
    assert checkpoints.resolve_all(wanted) == steps
  with pytest.raises(UserError, match="^--step: '4', expected: latest, best, 3, 5, 8"):
    checkpoints.resolve_all('3,4')


def test_all_checkpoints_are_scored_alike_on_every_mesh_without_another_program(workdir):
  store = make_store(workdir / 'store', [30, 12], vocab_size=259, draw=lambda count: np.random.default_rng(0).integers(4, 259, count))
  found = {}
  counter = CompileCounter()
  try:
    for model_axis in (1, 4):
      restorer = Restorer(workdir, model_axis)
      with jax.set_mesh(restorer.mesh):
        scorer = Scorer(restorer.model, next_token(), restorer.mesh, 8)
        likelihoods = LikelihoodScorer(restorer.model, restorer.mesh, 64)
        compiled = []
        for step in restorer.checkpoints.resolve_all('all'):
          before = counter.count
          trained = restorer.restore(step)
          score = scorer(trained.parameters, EvalRows(store, 16, True))
          found[model_axis, step] = [score.loss, *(one.nats for one in likelihoods(trained.parameters, ASKED))]
          compiled.append(counter.count - before)
        assert compiled[0] and not any(compiled[1:])
  finally:
    counter.close()
  for step in (3, 5, 8):
    np.testing.assert_allclose(found[1, step], found[4, step], rtol=1e-5)
  assert len({values[0] for values in found.values()}) >= 3
