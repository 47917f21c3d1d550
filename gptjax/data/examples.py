"""Examples as tokens with weights: the prompt and the answer are tokenized so that the loss begins with the answer's first token.

A text to classify is followed by the number of its class in place of a token's id, which is the one target.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.sources import Document, Turn
from gptjax.data.store import PART_END, TokenStore
from gptjax.data.tokenizers import Tokenizer


class Example(NamedTuple):
  """Token ids as a model reads them, from the id that starts a prompt to the one that ends the answer, or to the class."""

  ids: np.ndarray
  """[n]"""
  weights: np.ndarray
  """[n], of the loss of the id after each; the last is 0, or PART_END if another part follows"""
  target_bytes: float
  """UTF-8 bytes of the turns, times their weights, or of the text to classify"""


def encode_example(tokenizer: Tokenizer, document: Document) -> Example:
  """Encodes a document with turns and its further parts behind them, or with a class. A completion ends with eos_id, an answer in a
  conversation with the token by which the chat template ends the turn; both are targets. Raises a UserError for a conversation that the
  chat template rejects."""
  if document.label is not None:
    ids = np.array([*tokenizer.start_ids, *tokenizer.encode(document.text, document.name).tolist(), document.label], np.int32)
    return Example(ids, (np.arange(len(ids)) == len(ids) - 2).astype(float), len(document.text.encode()))
  parts = [_encode_turns(tokenizer, turns, document.name) for turns in (document.turns, *document.others)]
  for part in parts[:-1]:
    part.weights[-1] = PART_END
  ids, weights = (np.concatenate([part[at] for part in parts]) for at in (0, 1))
  return Example(ids, weights, sum(part.target_bytes for part in parts))


def _encode_turns(tokenizer: Tokenizer, turns: Sequence[Turn], name: str) -> Example:
  if turns[0].role:
    messages = [{'role': turn.role, 'content': turn.content} for turn in turns]
    of_rest = next((turn.weight for turn in turns if not turn.is_answer), 0.0)  # equal for all of them
    weighted = [(ids, of_rest if number is None else turns[number].weight) for ids, number in tokenizer.conversation(messages)]
  else:
    prompt, completion = tokenizer.encode_parts([turn.content for turn in turns], name)
    start = np.array(tokenizer.start_ids if len(prompt) or tokenizer.start_ids else [tokenizer.bos_id], np.int32)
    weighted = [(np.append(start, prompt), turns[0].weight), (np.append(completion, tokenizer.eos_id), turns[1].weight)]
  ids = np.concatenate([ids for ids, _ in weighted])
  of_ids = np.concatenate([np.full(len(ids), weight) for ids, weight in weighted])
  return Example(ids, np.append(of_ids[1:], 0.0), sum(turn.weight * len(turn.content.encode()) for turn in turns))


def marked_example(store: TokenStore, tokenizer: Tokenizer, number: int = 0) -> str:
  """The first 1,000 tokens of an example, with its targets between ⟦ and ⟧, and special ids, which have no text, as <id>; of a text to
  classify all tokens, and the name of its class."""
  start, stop = store.starts(number, number + 1)
  stop = stop if store.labels else min(stop, start + 1000)
  ids = store.read([start], [stop - start]).tolist()
  is_target = np.append(False, store.read([start], [stop - start - 1], field='weight') > 0)
  parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_target)) + 1)
  texts = [_with_specials(tokenizer, [ids[at] for at in part], is_first=not part[0]) for part in parts]
  if store.labels:
    texts[-1] = store.labels[ids[-1]]
  return ''.join(f'⟦{text}⟧' if is_target[part[0]] else text for text, part in zip(texts, parts, strict=True))


def _with_specials(tokenizer: Tokenizer, ids: list[int], is_first: bool) -> str:
  data = b''.join(tokenizer.pieces[one] or f'<{one}>'.encode() for one in ids)
  return (data.removeprefix(tokenizer.prefix) if is_first else data).decode(errors='replace')
