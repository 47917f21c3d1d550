"""A model of ours as EleutherAI's lm-evaluation-harness knows models (github.com/EleutherAI/lm-evaluation-harness).

Needs the lm_eval package (requirements-eval.txt), which imports neither torch nor TensorFlow for it.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptjax.config import UserError
from gptjax.data import Tokenizer
from gptjax.data.progress import announce
from gptjax.evaluation.likelihood import Asked, LikelihoodScorer
from gptjax.inference import Generator, Sampling
from gptjax.model import AbstractModel, Parameters
from gptjax.distributed import is_primary

MOST_TOKENS = 256
"""That are generated where a task says nothing, as in the harness's torch backend."""

_KNOWN = ('until', 'max_gen_toks', 'do_sample', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
_WITHOUT_EFFECT = {'num_beams': 1, 'num_return_sequences': 1, 'length_penalty': 1.0, 'use_cache': True}

Watch = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], None]]]
"""(title, total, unit): a context of long work, which is told of every so much that is done."""


def unwatched(title: str, total: int, unit: str) -> contextlib.AbstractContextManager[Callable[[int], None]]:
  """Shows nothing."""
  return contextlib.nullcontext(lambda done: None)


class HarnessModel(TemplateLM):
  """Answers what the harness asks: log-likelihoods of continuations, of whole texts, and generated text.

  Texts become ids as in the harness's torch backend (HFLM), of which the pairs are TemplateLM's: context and continuation are encoded
  together and cut after as many ids as the context has alone; spaces at the end of a context belong to the continuation; where there
  is no context the tokenizer's bos stands for it. What is too long for the model loses its beginning. Text that looks like a special
  token is text.

  Every process of a run answers everything, and so alike.

  Args:
    blueprint: of the model.
    mesh: where the parameters lie.
    tokenizer: of the model.
    batch_tokens: of a batch, padding included.
    add_bos: whether every context begins with the tokenizer's bos. None: as in HFLM, where transformers puts one: for all of ours but
      GPT-2's, and for published ones whose files ask for it.
    watch: shows progress.
  """

  def __init__(self, blueprint: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, batch_tokens: int, add_bos: bool | None = None,
               watch: Watch = unwatched):
    super().__init__()
    self._tokenizer, self._watch, self._context = tokenizer, watch, blueprint.context
    self._add_bos = bool(tokenizer.start_ids) if add_bos is None else add_bos
    self._rows = max(batch_tokens // blueprint.context, 1)
    self._scorer = LikelihoodScorer(blueprint, mesh, batch_tokens)
    self._generator = Generator(blueprint, mesh, tokenizer)
    self._parameters: Parameters | None = None
    self._weights: Parameters | None = None

  def use(self, parameters: Parameters | None) -> None:
    """Answers with these parameters from now on; no other programs are compiled for them. None: lets go of those before."""
    self._parameters, self._weights = parameters, None

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._tokenizer.bos_id

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Ids of a text, after the tokenizer's bos if the model wants it or `add_special_tokens` says so."""
    begin = self._add_bos if add_special_tokens is None else add_special_tokens
    return [self._tokenizer.bos_id] * begin + self._tokenizer.encode(string, 'text of a task').tolist()

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    """(nats, greedy) of each request (context, continuation).

    Raises:
      UserError: a text that the tokenizer cannot encode, or a continuation without tokens or longer than the model's context.
    """
    return super().loglikelihood(requests, disable_tqdm=True)

  def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **others: Any) -> list[tuple[float, bool]]:
    for (context, continuation), *_, ids in requests:
      if not ids:
        raise UserError('--tasks', context[-40:] + continuation, 'a continuation with tokens of its own; this one has none, or is one '
                        'with the end of its context')
    return self._scores([Asked(before or [self.prefix_token_id], ids) for _, before, ids in requests])

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
    """Nats of each whole text, in windows of the model's context, each token with as much before it as its window has."""
    windows: list[Asked] = []
    counts = []
    for request in requests:
      ids = self.tok_encode(request.args[0])
      pairs = get_rolling_token_windows(token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self._context, context_len=1)
      mine = [Asked(*make_disjoint_window(pair)) for pair in pairs]
      windows += mine
      counts.append(len(mine))
    scores = iter(self._scores(windows))
    return [sum(next(scores)[0] for _ in range(count)) for count in counts]

  def _scores(self, asked: Sequence[Asked]) -> list[tuple[float, bool]]:
    longest = max((len(one.continuation) for one in asked), default=0)
    if longest > self._context:
      raise UserError('--tasks', f'a continuation of {longest} tokens', f"at most the model's context of {self._context}")
    cut = sum(len(one.context) + len(one.continuation) > self._context + 1 for one in asked)
    with self._watch('log-likelihoods', len(asked), 'requests') as advance:
      found = self._scorer(self._given(), asked, advance)
    if cut and is_primary():
      announce(f"{cut:,} of {len(asked):,} requests are longer than the model's context of {self._context} tokens: cut at their beginning")
    return [(one.nats, one.greedy) for one in found]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    """The text that follows each request's context, up to one of its stop strings (`until`), the end of text or `max_gen_toks`.

    Raises:
      UserError: a context that leaves no room for so many tokens, or text that the tokenizer cannot encode.
    """
    if self._weights is None:
      self._weights = self._generator.prepare(self._given())
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
    answers = [''] * len(requests)
    with self._watch('generation', len(requests), 'requests') as advance:
      for settings, group in groups.items():
        options = self._options(json.loads(settings))
        room = self._context - options['max_tokens']
        prompts = {index: self.tok_encode(requests[index].args[0])[-room:] or [self.prefix_token_id] for index in group}
        order = sorted(group, key=lambda index: len(prompts[index]), reverse=True)
        for start in range(0, len(order), self._rows):
          some = order[start:start + self._rows]
          said = self._generator(self._weights, [prompts[index] for index in some], seeds=some, **options)
          for index, continuation in zip(some, said, strict=True):
            answers[index] = continuation.text
          advance(len(some))
    return answers

  def _options(self, settings: dict[str, Any]) -> dict[str, Any]:
    """The generator's settings for a task's."""
    told = normalize_gen_kwargs(settings, MOST_TOKENS)
    most = told['max_gen_toks']
    if not 0 < most < self._context:
      raise UserError('--tasks', f'max_gen_toks={most}', f"1 or more, and fewer than the model's context of {self._context}")
    if more := sorted(name for name in told if name not in _KNOWN and told[name] != _WITHOUT_EFFECT.get(name)):
      raise UserError('--tasks', f'{more[0]}={told[more[0]]}', f'a task that generates with {", ".join(_KNOWN)}')
    sampling = Sampling(told['temperature'] if told['do_sample'] else 0.0, int(told.get('top_k', 0)), float(told.get('top_p', 1.0)),
                        float(told.get('min_p', 0.0)), float(told.get('repetition_penalty', 1.0)))
    return {'max_tokens': most, 'sampling': sampling, 'stop': [stop for stop in told['until'] if stop]}

  def _given(self) -> Parameters:
    assert self._parameters is not None, 'use() comes first'
    return self._parameters
