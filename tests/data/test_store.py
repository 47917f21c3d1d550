"""A store gives back what was written, is memory-mapped, and is not trusted when half of it is missing."""

import hashlib

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data import Document, TokenStore, write_store
from gptjax.data.tokenizers import ByteTokenizer, CharTokenizer

DOCUMENTS = [Document('a', 'one\r\n'), Document('b', 'zwölf'), Document('c', '三')]


def test_each_document_is_there_between_bos_and_eos(tmp_path):
  tokenizer = ByteTokenizer()
  written = write_store(tmp_path, tokenizer, DOCUMENTS, 'writing')
  for store in (written, TokenStore.open(tmp_path)):
    assert store.documents == 3
    assert store.starts.dtype == np.int64
    assert store.tokens.dtype == np.uint16
    assert store.bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    assert store.targets == store.bytes + 3
    assert store.vocab_size == 260
    for document, stream in zip(DOCUMENTS, np.split(store.tokens, store.starts[1:]), strict=True):
      assert (stream[0], stream[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
      assert tokenizer.decode(stream[1:-1]) == document.text
    assert store.sha256 == hashlib.sha256((tmp_path / 'tokens.bin').read_bytes()).hexdigest()


def test_tokens_stay_on_disk(tmp_path):
  store = write_store(tmp_path, ByteTokenizer(), DOCUMENTS, 'writing')
  for array in (store.tokens, store.starts):
    assert isinstance(array.base, np.memmap)
    assert not array.flags.writeable


def test_ids_that_need_more_than_16_bits_have_them(tmp_path):
  characters = ''.join(map(chr, range(0x10000, 0x10000 + 2**16)))
  for size, dtype in ((2**16 - 4, np.uint16), (2**16 - 3, np.uint32)):
    tokenizer = CharTokenizer(characters[:size])
    store = write_store(tmp_path / str(size), tokenizer, [Document('a', characters[:size])], 'writing')
    assert store.tokens.dtype == dtype
    assert (store.tokens[1:-1] == np.arange(4, 4 + size)).all()


def test_text_the_tokenizer_lacks_is_named_with_its_document(tmp_path):
  with pytest.raises(UserError, match=r"^b, character 2: 'ö'"):
    write_store(tmp_path, CharTokenizer('enozw\r\n'), DOCUMENTS, 'writing')
  with pytest.raises(UserError, match=r'^token store: '):
    TokenStore.open(tmp_path)


def test_a_broken_store_is_an_error_and_can_be_written_again(tmp_path):
  class Killed(ByteTokenizer):

    def encode(self, text, source='text'):
      if source == 'c':
        raise KeyboardInterrupt
      return super().encode(text, source)

  with pytest.raises(KeyboardInterrupt):
    write_store(tmp_path, Killed(), DOCUMENTS, 'writing')
  with pytest.raises(UserError, match=rf'^token store: {str(tmp_path)!r}'):
    TokenStore.open(tmp_path)
  assert write_store(tmp_path, ByteTokenizer(), DOCUMENTS, 'writing').documents == 3


@pytest.mark.parametrize('name', ['tokens.bin', 'starts.npy', 'manifest.json'])
def test_a_truncated_file_is_noticed(tmp_path, name):
  write_store(tmp_path, ByteTokenizer(), DOCUMENTS, 'writing')
  (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2])
  with pytest.raises(UserError, match=r'^token store: '):
    TokenStore.open(tmp_path)
