"""A saved tokenizer's way back."""

import json
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.tokenizers.gpt2 import ENCODER, Gpt2Tokenizer
from gptjax.data.tokenizers.subwords import MODEL, SentencePieceTokenizer, Words
from gptjax.data.tokenizers.tokenizer import FILE, ByteTokenizer, CharTokenizer, Tokenizer


def load_tokenizer(directory: Path | str) -> Tokenizer:
  """Reads what `Tokenizer.save` wrote, or GPT-2's two files.

  Raises:
    UserError: the folder has no tokenizer, or a damaged one.
  """
  path = Path(directory).expanduser() / FILE
  if not path.exists() and (path.parent / ENCODER).exists():
    return Gpt2Tokenizer(path.parent)
  try:
    saved = json.loads(path.read_text(encoding='utf-8'))
    match saved['kind']:
      case 'bytes':
        return ByteTokenizer()
      case 'chars':
        return CharTokenizer(saved['characters'])
      case 'gpt2':
        return Gpt2Tokenizer(path.parent)
      case 'bpe' | 'unigram':
        return SentencePieceTokenizer(saved['kind'], (path.parent / MODEL).read_bytes(), Words(saved['words'], saved['symbols']))
  except UserError:
    raise
  except OSError as error:
    raise UserError('tokenizer', str(directory), f'a folder with {FILE} and what belongs to it ({error.strerror}: '
                    f'{error.filename})') from None
  except (ValueError, KeyError, TypeError, RuntimeError) as error:
    raise UserError('tokenizer', str(directory), f'a folder whose {FILE} is whole ({type(error).__name__}: {error})') from None
  raise UserError(str(path), saved['kind'], 'a kind that this version of gptjax knows: bpe, unigram, chars, bytes, gpt2')
