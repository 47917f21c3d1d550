"""Answers to the harness equal those of its own torch backend: log-likelihoods, rolling ones and generated text."""

import json
import os

import jax
import numpy as np
import pytest

import test_families
import tokenizers

from gptjax.config import ComputeConfig
from gptjax.data.tokenizers import Gpt2Tokenizer
from gptjax.interop import FAMILIES, Fields
from gptjax.model import abstract_model

torch = transformers = None
pytestmark = pytest.mark.full

CONTEXT = 32
TEXT = '''It's the reader's choice: they'll read 1,234 pages, or we've read them all by 2024 -- isn't that so?
  The lines that are indented,    and the words that stand apart;\tthen a tab, and déjà vu, naïve, 日本語 日本.\n''' * 3


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  """A small vocabulary in the form of GPT-2's, for us and for transformers."""
  folder = tmp_path_factory.mktemp('gpt2')
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator([TEXT], vocab_size=400, min_frequency=2, show_progress=False)
  trained.save_model(str(folder))
  ids = json.loads((folder / 'vocab.json').read_text('utf-8'))
  (folder / 'encoder.json').write_text(json.dumps({**ids, '<|endoftext|>': len(ids)}))
  (folder / 'merges.txt').rename(folder / 'vocab.bpe')
  trained.add_special_tokens(['<|endoftext|>'])
  special = dict.fromkeys(('bos_token', 'eos_token', 'pad_token'), '<|endoftext|>')
  return Gpt2Tokenizer(folder), transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **special)


@pytest.fixture(params=['gpt2', 'llama'])
def both(request, tokenizer, one_device, monkeypatch):
  """Our adapter and theirs, of the same model."""
  monkeypatch.setitem(os.environ, 'HF_HUB_OFFLINE', '1')
  pytest.importorskip('lm_eval')
  pytest.importorskip('accelerate')
  from lm_eval.models.huggingface import HFLM

  from gptjax.evaluation.harness import HarnessModel
  monkeypatch.setattr(test_families, 'torch', torch)
  monkeypatch.setattr(test_families, 'transformers', transformers)
  name, count = request.param, tokenizer[0].vocab_size
  monkeypatch.setattr(test_families, 'VOCABULARY', count)
  shape = test_families.SHAPES[name][0] | {'vocab_size': count, 'n_positions': CONTEXT, 'max_position_embeddings': CONTEXT}
  shape = {key: value for key, value in shape.items() if key != ('n_positions' if name == 'llama' else 'max_position_embeddings')}
  reference = test_families.reference(name, shape)
  config, context = FAMILIES[name].read(Fields(reference.config.to_dict() | {'architectures': [type(reference).__name__]}))
  described = abstract_model(config, ComputeConfig(), context)
  values = test_families.ours(name, config, {key: p.detach().numpy() for key, p in reference.named_parameters()})
  ours = HarnessModel(described, one_device, tokenizer[0], 256)
  ours.use(jax.device_put(values, described.shardings(0, one_device)))
  return ours, HFLM(pretrained=reference, tokenizer=tokenizer[1], batch_size=4, device='cpu')


def requests(kind, arguments):
  from lm_eval.api.instance import Instance
  return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


PAIRS = [
  ('It is', ' so'), ('the words  ', 'apart'), ('', 'déjà vu'), ('they', "'ll"), (TEXT[:150], ' the reader'), ('a', ' b'),
  ('pages, or we', 've read them'), ('The lines that', TEXT[40:60])]


def test_answers_are_those_of_the_torch_backend(both):
  ours, theirs = both
  got, want = ([*model.loglikelihood(requests('loglikelihood', PAIRS), disable_tqdm=True)] for model in both)
  np.testing.assert_allclose([nats for nats, _ in got], [nats for nats, _ in want], rtol=1e-4)
  assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
  texts = [(TEXT[:20],), (TEXT,), ('x',)]
  got, want = (model.loglikelihood_rolling(requests('loglikelihood_rolling', texts), disable_tqdm=True) for model in both)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  prompts = [(text, {'until': ['\n'], 'max_gen_toks': 8}) for text in ('It is', 'the reader', TEXT[:200])]
  for prompt in prompts:  # one by one: theirs cuts the padding of several off with their beginnings
    got, want = (model.generate_until(requests('generate_until', [prompt]), disable_tqdm=True) for model in both)
    assert got == want
