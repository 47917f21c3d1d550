"""Validation during training: scores of held-out documents, and a sample."""

import functools
from collections.abc import Callable

import jax

from gptjax import inference
from gptjax.config import unescaped
from gptjax.data import Prepared
from gptjax.evaluation import Scorer
from gptjax.model import Parameters
from gptjax.training.logbook import Logbook
from gptjax.training.passes import PassScorer
from gptjax.training.rewards import Rewards
from gptjax.training.run import Run, every
from gptjax.training.step import TrainState


class Validation:
  """Scores the validation sets of a run and writes a sample; `advance` is called whenever some rows are scored."""

  def __init__(self, run: Run, data: Prepared, book: Logbook, advance: Callable[[int], None], rewards: Rewards):
    self._run, self._data, self._book, self._advance = run, data, book, advance
    standard = run.standard
    self._scorer: Scorer | PassScorer
    self._draws = run.config.objective.kind == 'grpo'
    if self._draws:
      self._scorer = PassScorer(standard.model.base, standard.mesh, data.tokenizer, standard.zero_stage, run.config, run.config.objective,
                                run.config.eval.completions, rewards)
      return
    self._scorer = Scorer(standard.model, run.objective, standard.mesh, run.config.microbatch_size, standard.zero_stage)

  def due(self, step: int) -> bool:
    """At config.eval.every, at the end, and where a checkpoint may become the best, which needs its loss."""
    run = self._run
    return step == run.steps or every(run.eval_every, step) or (run.config.checkpoint.keep_best and every(run.checkpoint_every, step))

  def __call__(self, step: int, state: TrainState) -> float:
    """Logs scores and a sample; returns the mean loss of all sets, in nats per token."""
    parameters = self._run.standard.parameters(state.parameters)
    with jax.set_mesh(self._run.standard.mesh):
      return self._validate(step, parameters)

  def _validate(self, step: int, parameters: Parameters) -> float:
    run, settings = self._run, self._run.config.eval
    merged = run.standard.model.merged(parameters) if self._draws else parameters
    scores = self._scorer.sets(merged, run.valid, self._data.tags, count=0 if step == run.steps else settings.rows,
                               advance=self._advance)
    self._book.validation(step, scores.named())
    if settings.sample_tokens and not run.config.model.classes:
      weights = self._generator.prepare(run.standard.model.merged(parameters))
      prompt = unescaped(settings.prompt)
      asked = [{'role': 'user', 'content': prompt}] if prompt and run.config.data.source.chat else prompt
      sample, = self._generator(weights, [self._generator.prompt(asked, 'eval.prompt')], max_tokens=settings.sample_tokens,
                                seeds=[run.config.seed])
      self._book.sample(step, prompt if asked is prompt else f'{prompt}\n', sample.text)
    return scores.overall.loss

  @functools.cached_property
  def _generator(self) -> inference.Generator:
    standard = self._run.standard
    return inference.Generator(standard.model.base, standard.mesh, self._data.tokenizer, standard.zero_stage)
