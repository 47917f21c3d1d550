"""Scores of a model by the completions that it draws for held-out prompts: mean rewards, pass@1, pass@k, greedy accuracy."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, ObjectiveConfig
from gptjax.data import EvalRows, Tokenizer
from gptjax.data.rows import mix
from gptjax.evaluation import Score, Scores, pooled, score_of_examples
from gptjax.model import AbstractModel, Parameters
from gptjax.training.rewards import make_rewards
from gptjax.training.rollouts import Drawing, check_space, judged, prompts_of


class PassScorer:
  """Scores rows of any number of sets; a `Scorer` for rewards.

  A completion passes if the first reward is 1 or more. Figures per prompt: `reward`, the weighted sum, and each reward, means over
  completions; `pass@1`, the fraction of completions that pass, and `pass@N`, whether one of N does; `greedy`, whether that of the most
  likely tokens does; `length` in tokens and the fraction `truncated`. The loss is minus the reward.

  Args:
    model, mesh, zero_stage: of the parameters, without adapters.
    config: the run's.
    objective: rewards and max_tokens.
    completions: N, drawn per prompt, by the prompt's place in its set.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, zero_stage: int, config: Config, objective: ObjectiveConfig,
               completions: int, reward_file: Path | None):
    self._tokenizer, self._config, self._objective, self._completions = tokenizer, config, objective, completions
    self._functions = make_rewards(objective.rewards, reward_file)
    self._advance: Callable[[int], None] = lambda rows: None
    self._drawing = Drawing(model, mesh, tokenizer, zero_stage, objective.max_tokens, config.microbatch_size, lambda rows: self._advance(0))

  def sets(self, parameters: Parameters, sets: Mapping[str, EvalRows], tags: Mapping[str, Iterable[str]], *, count: int = 0,
           advance: Callable[[int], None] = lambda rows: None) -> Scores:
    """As those of `Scorer`; parameters without adapters."""
    weights, self._advance = self._drawing.prepare(parameters), advance
    scores = {name: self._score(weights, rows, count, advance) for name, rows in sets.items()}
    return Scores(scores, {tag: pooled(scores[name] for name in names) for tag, names in tags.items()})

  def _score(self, weights: Parameters, rows: EvalRows, count: int, advance: Callable[[int], None]) -> Score:
    indices = np.arange(rows.count) if not 0 < count < rows.count else np.arange(count) * rows.count // count
    prompts = [*prompts_of(rows.batch(indices), self._tokenizer)]
    for prompt in prompts:
      check_space(prompt, self._config, self._objective.max_tokens)
    each = [prompt for prompt in prompts for _ in range(self._completions)]
    seeds = mix(mix(np.full(1, self._config.seed, np.uint64)) ^ np.arange(len(each), dtype=np.uint64)) >> np.uint64(32)
    sums: dict[str, float] = {}
    for kind, chosen, drawn in (
        ('', each, self._drawing(weights, [one.ids for one in each], seeds.tolist())),
        ('greedy', prompts, self._drawing(weights, [one.ids for one in prompts], [0] * len(prompts), temperature=0.0))):
      rewards = judged(self._functions, chosen, drawn, self._objective.max_tokens)
      passed = (np.nan_to_num(next(iter(rewards.values()))) >= 1).reshape(len(prompts), -1)
      if kind:
        sums['greedy'] = passed.sum()
        continue
      total = sum(one.weight * np.nan_to_num(rewards[one.name]) for one in self._objective.rewards)
      of_prompts = lambda values: float(np.asarray(values, float).reshape(len(prompts), -1).mean(-1).sum())
      sums = {'loss': -of_prompts(total), 'reward': of_prompts(total),
              **{f'reward_{name}': of_prompts(np.nan_to_num(values)) for name, values in rewards.items()},
              'pass@1': of_prompts(passed), f'pass@{self._completions}': passed.any(-1).sum(),
              'length': of_prompts([len(ids) for ids in drawn.ids]), 'truncated': of_prompts(~drawn.ended)}
      tokens = sum(map(len, drawn.ids))
    advance(len(indices))
    return score_of_examples(sums, len(prompts), tokens, float(sum(len(text.encode()) for text in drawn.texts)))
