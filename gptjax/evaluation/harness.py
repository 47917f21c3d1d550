"""Adapter that makes our models available to EleutherAI's lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness).

It needs the lm_eval package (requirements-eval.txt), but neither torch nor TensorFlow.
"""

import json
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptjax.config import UserError
from gptjax.data import Tokenizer
from gptjax.data.progress import ProgressBar, announce
from gptjax.evaluation.likelihood import LikelihoodScorer, Request
from gptjax.inference import Generator, Sampling
from gptjax.model import AbstractModel, Parameters
from gptjax.distributed import is_primary

MAX_TOKENS = 256
"""Tokens to generate if a task sets no limit, as in the harness's torch backend."""

_SUPPORTED = ('until', 'max_gen_toks', 'do_sample', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
_WITHOUT_EFFECT = {'num_beams': 1, 'num_return_sequences': 1, 'length_penalty': 1.0, 'use_cache': True}


class HarnessModel(TemplateLM):
  """Computes log-likelihoods of continuations, of complete texts, and generated text for the harness, equally in every process.

  Texts are encoded as in the harness's torch backend (HFLM): context and continuation are encoded together and split after as many ids
  as the context alone has; trailing spaces of a context belong to the continuation; an empty context becomes the tokenizer's bos.
  Requests that exceed the context are truncated at their beginning. Text that looks like a special token is encoded as ordinary text.

  Args:
    model, mesh: of the parameters.
    tokenizer: of the model.
    batch_tokens: tokens per batch, including padding.
    add_bos: whether every context begins with the tokenizer's bos. None: as in transformers, and so in HFLM: for all of our tokenizers
      except GPT-2's, and for published ones whose files ask for it.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, batch_tokens: int, add_bos: bool | None = None):
    super().__init__()
    self._tokenizer, self._context = tokenizer, model.context
    self._add_bos = bool(tokenizer.start_ids) if add_bos is None else add_bos
    self._rows = max(batch_tokens // model.context, 1)
    self._scorer = LikelihoodScorer(model, mesh, batch_tokens)
    self._generator = Generator(model, mesh, tokenizer)
    self.use({})

  def use(self, parameters: Parameters) -> None:
    """Sets the parameters to evaluate, without compiling anything again; {} frees the current ones."""
    self._parameters, self._weights = parameters, Parameters()

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._tokenizer.bos_id

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Ids of a text, after bos if `add_special_tokens` or, by default, `add_bos` is true."""
    begin = self._add_bos if add_special_tokens is None else add_special_tokens
    return [self._tokenizer.bos_id] * begin + self._tokenizer.encode(string, 'text of a task').tolist()

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
    """(nats, greedy) of each request (context, continuation). Raises a UserError for a text that the tokenizer cannot encode, and for a
    continuation that has no tokens or exceeds the model's context."""
    return super().loglikelihood(requests, disable_tqdm=True)

  def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **others: Any) -> list[tuple[float, bool]]:
    for (context, continuation), *_, ids in requests:
      if not ids:
        raise UserError('--tasks', context[-40:] + continuation, 'a continuation with tokens of its own; this one is empty or merges '
                        'with the end of its context')
    return self._scores([Request(before or [self.prefix_token_id], ids) for _, before, ids in requests])

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
    """Nats of each complete text, in disjoint windows of the model's context length; tokens see only their own window."""
    pairs = lambda ids: get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self._context, context_len=1)
    windows = [[Request(*make_disjoint_window(pair)) for pair in pairs(self.tok_encode(request.args[0]))] for request in requests]
    scores = iter(self._scores([window for some in windows for window in some]))
    return [sum(next(scores)[0] for _ in some) for some in windows]

  def _scores(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    longest = max((len(one.continuation) for one in requests), default=0)
    if longest > self._context:
      raise UserError('--tasks', f'a continuation of {longest} tokens', f"at most the model's context of {self._context}")
    cut = sum(len(one.context) + len(one.continuation) > self._context + 1 for one in requests)
    with ProgressBar('log-likelihoods', len(requests), 'requests', shown=is_primary()) as work:
      found = self._scorer(self._parameters, requests, work.advance)
    if cut and is_primary():
      announce(f"{cut:,} of {len(requests):,} requests exceed the model's context of {self._context} tokens: truncated at their beginning")
    return [(one.nats, one.greedy) for one in found]

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    """The text that follows each request's context, up to one of its stop strings (`until`), the end of text or `max_gen_toks`. Raises a
    UserError for a text that the tokenizer cannot encode, or if `max_gen_toks` leaves no space for a prompt."""
    if not self._weights:
      self._weights = self._generator.prepare(self._parameters)
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
    answers = [''] * len(requests)
    with ProgressBar('generation', len(requests), 'requests', shown=is_primary()) as work:
      for settings, group in groups.items():
        options = self._options(json.loads(settings))
        prompt_tokens = self._context - options['max_tokens']
        prompts = {index: self.tok_encode(requests[index].args[0])[-prompt_tokens:] or [self.prefix_token_id] for index in group}
        order = sorted(group, key=lambda index: len(prompts[index]), reverse=True)
        for start in range(0, len(order), self._rows):
          some = order[start:start + self._rows]
          continuations = self._generator(self._weights, [prompts[index] for index in some], seeds=some, **options)
          for index, continuation in zip(some, continuations, strict=True):
            answers[index] = continuation.text
          work.advance(len(some))
    return answers

  def _options(self, settings: dict[str, Any]) -> dict[str, Any]:
    """The generator's settings for those of a task."""
    given = normalize_gen_kwargs(settings, MAX_TOKENS)
    max_tokens = given['max_gen_toks']
    if not 0 < max_tokens < self._context:
      raise UserError('--tasks', f'max_gen_toks={max_tokens}', f"at least 1 and less than the model's context of {self._context}")
    if unsupported := sorted(name for name in given if name not in _SUPPORTED and given[name] != _WITHOUT_EFFECT.get(name)):
      raise UserError('--tasks', f'{unsupported[0]}={given[unsupported[0]]}', f'a task that generates with {", ".join(_SUPPORTED)}')
    sampling = Sampling(given['temperature'] if given['do_sample'] else 0.0, int(given.get('top_k', 0)), **{
      name: float(given[name]) for name in ('top_p', 'min_p', 'repetition_penalty') if name in given})
    return {'max_tokens': max_tokens, 'sampling': sampling, 'stop': [stop for stop in given['until'] if stop]}
