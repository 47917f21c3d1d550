"""Loading of tokenizers."""

import json
import re
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.tokenizers.gpt2 import HUGGING_FACE_FILES, OPENAI_FILES, Gpt2Tokenizer
from gptjax.data.tokenizers.hugging_face import HuggingFaceTokenizer
from gptjax.data.tokenizers.published import DESCRIPTION, MODEL, Published
from gptjax.data.tokenizers.sentencepiece_model import SentencePieceModel
from gptjax.data.tokenizers.subwords import SentencePieceTokenizer, Words
from gptjax.data.tokenizers.tokenizer import FILE, ByteTokenizer, CharTokenizer, Tokenizer
from gptjax.files import expanded

_PUBLISHED = {DESCRIPTION: 'hugging_face', OPENAI_FILES[0]: 'gpt2', HUGGING_FACE_FILES[1]: 'gpt2', MODEL: 'sentencepiece'}
"""Kinds of published models' tokenizers by a file of their folders, in order of precedence."""


def load_tokenizer(directory: Path | str) -> Tokenizer:
  """Loads a tokenizer from a folder that `Tokenizer.save` wrote, or from a published model's.

  A published model's folder has tokenizer.json, GPT-2's two files (encoder.json and vocab.bpe, or vocab.json and merges.txt), or
  tokenizer.model. Raises a UserError if the folder has no tokenizer, or a damaged one.
  """
  folder = expanded(directory)
  published = [kind for name, kind in _PUBLISHED.items() if (folder / name).exists()]
  try:
    saved = {'kind': published[0]} if published and not (folder / FILE).exists() else json.loads((folder / FILE).read_text('utf-8'))
    match saved['kind']:
      case 'bytes':
        return ByteTokenizer()
      case 'chars':
        return CharTokenizer(saved['characters'])
      case 'gpt2':
        return Gpt2Tokenizer(folder)
      case 'hugging_face':
        return HuggingFaceTokenizer(Published.read(folder))
      case 'sentencepiece':
        return SentencePieceModel(Published.read(folder))
      case 'bpe' | 'unigram':
        return SentencePieceTokenizer(saved['kind'], (folder / MODEL).read_bytes(), Words(saved['words'], saved['symbols']))
  except UserError:
    raise
  except OSError as error:
    raise UserError('tokenizer', str(directory), f"a folder with {FILE} and its other files, or with a published model's {DESCRIPTION}, "
                    f"{MODEL} or {OPENAI_FILES[0]} ({error.strerror}: {error.filename})") from None
  except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, re.error) as error:  # RecursionError is a RuntimeError
    raise UserError('tokenizer', str(directory), f'a folder with an undamaged tokenizer ({type(error).__name__}: {error})') from None
  raise UserError(str(folder / FILE), saved['kind'], 'a kind that this version of gptjax supports: bpe, unigram, chars, bytes, gpt2, '
                  'hugging_face, sentencepiece')
