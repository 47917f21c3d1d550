"""A saved tokenizer's way back."""

import json
import re
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.tokenizers.gpt2 import ENCODER, MERGES_TEXT, Gpt2Tokenizer
from gptjax.data.tokenizers.hugging_face import HuggingFaceTokenizer
from gptjax.data.tokenizers.published import DESCRIPTION, Published
from gptjax.data.tokenizers.sentencepiece_model import SentencePieceModel
from gptjax.data.tokenizers.subwords import MODEL, SentencePieceTokenizer, Words
from gptjax.data.tokenizers.tokenizer import FILE, ByteTokenizer, CharTokenizer, Tokenizer
from gptjax.files import expanded


def load_tokenizer(directory: Path | str) -> Tokenizer:
  """Reads what `Tokenizer.save` wrote, or a published model's: a folder of Hugging Face's with tokenizer.json, one with GPT-2's two
  files (encoder.json and vocab.bpe, or vocab.json and merges.txt), or one with SentencePiece's tokenizer.model.

  Raises:
    UserError: the folder has no tokenizer, or a damaged one.
  """
  folder = expanded(directory)
  path = folder / FILE
  try:
    if not path.exists() and (published := _published(folder)):
      return published
    saved = json.loads(path.read_text(encoding='utf-8'))
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
    raise UserError('tokenizer', str(directory), f'a folder with {FILE} and what belongs to it, or with a published '
                    f"model's {DESCRIPTION}, {MODEL} or {ENCODER} ({error.strerror}: {error.filename})") from None
  except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, re.error) as error:  # RecursionError is a RuntimeError
    raise UserError('tokenizer', str(directory), f'a folder whose tokenizer is whole ({type(error).__name__}: {error})') from None
  raise UserError(str(path), saved['kind'], 'a kind that this version of gptjax knows: bpe, unigram, chars, bytes, gpt2, '
                  'hugging_face, sentencepiece')


def _published(folder: Path) -> Tokenizer | None:
  if (folder / DESCRIPTION).exists():
    return HuggingFaceTokenizer(Published.read(folder))
  if (folder / ENCODER).exists() or (folder / MERGES_TEXT).exists():
    return Gpt2Tokenizer(folder)
  return SentencePieceModel(Published.read(folder)) if (folder / MODEL).exists() else None
