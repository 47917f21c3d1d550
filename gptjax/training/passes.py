"""Scores of a model by the completions that it draws for held-out prompts: mean rewards, pass@1, pass@k, greedy accuracy."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, ObjectiveConfig
from gptjax.data import EvalRows, Tokenizer
from gptjax.evaluation import Score, Scores, pooled, score_of_examples
from gptjax.model import AbstractModel, Parameters
from gptjax.training.rewards import Rewards
from gptjax.training.rollouts import Completions, Drawing, Prompt, check_space, judged, prompts_of, seeds_of


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
    rewards: functions of objective.rewards.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, zero_stage: int, config: Config, objective: ObjectiveConfig,
               completions: int, rewards: Rewards):
    self._tokenizer, self._config, self._objective, self._completions = tokenizer, config, objective, completions
    self._rewards = rewards
    self._advance: Callable[[int], None] = lambda rows: None
    self._drawing = Drawing(model, mesh, tokenizer, zero_stage, objective.max_tokens, config.microbatch_size, lambda rows: self._advance(0))

  def sets(self, parameters: Parameters, sets: Mapping[str, EvalRows], tags: Mapping[str, Iterable[str]], *, count: int = 0,
           advance: Callable[[int], None] = lambda rows: None) -> Scores:
    """As those of `Scorer`; parameters without adapters."""
    weights, self._advance = self._drawing.prepare(parameters), advance
    scores = {name: self._score(weights, rows, count, advance) for name, rows in sets.items()}
    return Scores(scores, {tag: pooled(scores[name] for name in names) for tag, names in tags.items()})

  def _score(self, weights: Parameters, rows: EvalRows, count: int, advance: Callable[[int], None]) -> Score:
    indices = rows.spaced(count)
    prompts = [*prompts_of(rows.batch(indices), self._tokenizer)]
    for prompt in prompts:
      check_space(prompt, self._config, self._objective.max_tokens)
    each = [prompt for prompt in prompts for _ in range(self._completions)]
    drawn, rewards, passed = self._judged(weights, each, seeds_of(self._config.seed, 0, len(each)))
    _, _, greedy = self._judged(weights, prompts, [0] * len(prompts), temperature=0.0)
    total = sum(one.weight * rewards[one.name] for one in self._objective.rewards)
    by_prompt = lambda values: np.asarray(values, float).reshape(len(prompts), -1)
    sum_of = lambda values: float(by_prompt(values).mean(-1).sum())
    sums = {'loss': -sum_of(total), 'reward': sum_of(total), **{f'reward_{name}': sum_of(values) for name, values in rewards.items()},
            'pass@1': sum_of(passed), f'pass@{self._completions}': by_prompt(passed).any(-1).sum(), 'greedy': greedy.sum(),
            'length': sum_of([len(ids) for ids in drawn.ids]), 'truncated': sum_of(~drawn.ended)}
    advance(len(indices))
    return score_of_examples(sums, len(prompts), sum(map(len, drawn.ids)), float(sum(len(text.encode()) for text in drawn.texts)))

  def _judged(self, weights: Parameters, prompts: Sequence[Prompt], seeds: Sequence[int],
              temperature: float = 1.0) -> tuple[Completions, dict[str, np.ndarray], np.ndarray]:
    """The completion of each prompt, its rewards (0 where there is none), and whether it passes."""
    drawn = self._drawing(weights, [one.ids for one in prompts], seeds, temperature)
    rewards = {name: np.nan_to_num(values) for name, values in judged(self._rewards, prompts, drawn, self._objective.max_tokens).items()}
    return drawn, rewards, rewards[self._objective.rewards[0].name] >= 1
