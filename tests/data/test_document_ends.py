"""Tokenizers whose bos and eos differ: a document has both, and the bos after an eos is not a target."""

import collections

import numpy as np
import pytest
from published_tokenizers import FAMILIES

from gptjax.config import SourceConfig
from gptjax.data import EvalRows, Mixture, Packed, TrainRows, Windows, tokenizing
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import load_tokenizer
from gptjax.data.tokenizing import Recipe, write_store

TEXTS = ['The first.', ' a second document that is somewhat longer than a row', 'x', '<|eot_id|> is text, and </s>', 'the last one']


@pytest.fixture(params=['llama3', 'llama2', 'gpt2'])
def store(request, tmp_path):
  FAMILIES[request.param](tmp_path / 'tokenizer')
  (tmp_path / 'text.txt').write_text('\n'.join(TEXTS))
  source = open_source(SourceConfig(str(tmp_path / 'text.txt'), separator='\\n'))
  return write_store(tmp_path / 'store', Recipe(source, load_tokenizer(tmp_path / 'tokenizer')))


def test_a_document_has_bos_and_eos(store):
  tokenizer = store.tokenizer()
  places = store.starts(0, store.documents)
  ends = [tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else []
  for text, start, stop in zip(TEXTS, places, places[1:]):
    ids = store.read([start], [stop - start]).tolist()
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text), *ends] and tokenizer.decode(ids) == text
  assert store.tokens - store.targets == len(TEXTS) * len(ends)


@pytest.mark.parametrize('kind', ['concat', 'pack', 'document'])
@pytest.mark.parametrize('context', [5, 16, 100])
def test_every_id_except_bos_is_a_target_once(store, kind, context, tmp_path):
  layout = Windows(store, context) if kind == 'concat' else Packed(store, context, kind, tmp_path)
  rows = TrainRows([layout], Mixture([layout.count], [1.0]), context, 0, True)
  ids = store.read([0], [store.tokens])
  two = store.end != store.separator
  wanted = collections.Counter(ids[ids != store.separator].tolist() if two else ids.tolist())
  for batch in (rows.batch(np.arange(layout.count)), rows.batch(layout.count + np.arange(layout.count)),
                EvalRows(store, context, True).batch(np.arange(-(-store.tokens // context)))):
    real = batch['mask'] > 0
    assert collections.Counter(batch['targets'][real].tolist()) == wanted
    assert batch['mask'].sum() == store.targets
    if two:
      assert not (real & (batch['tokens'] == store.end)).any()
      assert real[(batch['tokens'] != store.end) & (batch['segments'] > 0)].all()


@pytest.mark.parametrize('family', ['qwen2', 'mistral'])
def test_processes_have_the_same_tokenizer(family, tmp_path, monkeypatch):
  FAMILIES[family](tmp_path / 'tokenizer')
  for i, text in enumerate(TEXTS):
    (tmp_path / 'texts').mkdir(exist_ok=True)
    (tmp_path / f'texts/{i}.txt').write_text(text)
  monkeypatch.setattr(tokenizing, 'TASK', 1)  # a task a file
  recipe = Recipe(open_source(SourceConfig(str(tmp_path / 'texts'))), load_tokenizer(tmp_path / 'tokenizer'))
  stores = [write_store(tmp_path / str(processes), recipe, processes=processes) for processes in (1, 2)]
  assert stores[0].sha256 == stores[1].sha256
  assert stores[0].tokenizer().sha256 == recipe.tokenizer.sha256
