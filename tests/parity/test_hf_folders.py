"""Folders that transformers writes, and folders that it opens."""

import json

import numpy as np
import pytest
import tokenizers
from tiny import config as tiny_config
from tiny import files_below, run, write_text

from gptjax.config import UserError
from gptjax.data import load_tokenizer
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.interop import Check, comparison, export_run, import_folder, importing
from gptjax.interop.matching import bits
from gptjax.interop.tensor_files import read_tensors

torch = transformers = None
pytestmark = pytest.mark.full

SHAPE = {'vocab_size': 261, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 128, 'sliding_window': 7, 'initializer_range': 0.3}
MORE = {'gemma2': {'head_dim': 16}, 'mixtral': {'head_dim': 16, 'num_local_experts': 4}, 'qwen3_moe': {'head_dim': 16, 'num_experts': 8},
        'olmoe': {'num_experts': 8, 'eos_token_id': 1}}


@pytest.fixture(params=['gemma2'])
def saved(request, tmp_path):
  """A model in bfloat16 and shards, as transformers saves it."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(request.param, **SHAPE, **MORE[request.param])
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
  model.save_pretrained(tmp_path / 'in', max_shard_size='40KB')
  ByteTokenizer().save_hugging_face(tmp_path / 'in')
  return tmp_path / 'in'


@pytest.mark.parametrize('saved', ['gemma2', 'mixtral', 'qwen3_moe', 'olmoe'], indirect=True)
def test_a_folder_of_transformers_is_imported_and_exported(saved, tmp_path):
  assert len(list(saved.glob('*.safetensors'))) > 1
  for words in (import_folder(saved, tmp_path / 'run', check=Check('transformers')),
                export_run(tmp_path / 'run', tmp_path / 'out', check=Check('transformers', prompt='any text'), shard_bytes=50_000)):
    assert float(words.split('largest difference of logits ')[1].split()[0]) < 1e-4
    assert abs(float(words.split('mean KL ')[1].split()[0])) < 1e-8
  one, other = read_tensors(saved), read_tensors(tmp_path / 'out')
  assert one.keys() == other.keys() and all(np.array_equal(bits(one[name].view()), bits(other[name].view())) for name in one)
  theirs = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (saved, tmp_path / 'out')]
  assert theirs[0].dtype == theirs[1].dtype == torch.bfloat16
  same = zip(*(model.state_dict().items() for model in theirs), strict=True)
  assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in same)


def test_a_tokenizer_under_openais_names_is_exported_for_transformers(tmp_path):
  source = tmp_path / 'in'
  shape = transformers.GPT2Config(vocab_size=400, n_positions=16, n_embd=8, n_layer=1, n_head=1)
  transformers.GPT2LMHeadModel(shape).save_pretrained(source)
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator(['the reader reads what the writer writes'] * 9, vocab_size=280, min_frequency=2, show_progress=False)
  trained.save_model(str(source))
  ids = json.loads((source / 'vocab.json').read_text('utf-8'))
  (source / 'encoder.json').write_text(json.dumps({**ids, '<|endoftext|>': len(ids)}))
  (source / 'merges.txt').rename(source / 'vocab.bpe')
  (source / 'vocab.json').unlink()
  import_folder(source, tmp_path / 'run', check=Check('none'))
  export_run(tmp_path / 'run', tmp_path / 'out', check=Check('none'))
  text = 'the writer reads'
  ours = load_tokenizer(tmp_path / 'run/data/tokenizer').encode(text).tolist()
  assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')(text)['input_ids'] == ours == trained.encode(text).ids
  assert not (tmp_path / 'out/encoder.json').exists()


def test_logits_that_differ_leave_nothing(saved, tmp_path, monkeypatch):
  monkeypatch.setattr(importing, 'our_logits', lambda *args: comparison.our_logits(*args) + np.float32(0.01))
  with pytest.raises(UserError, match='--check=transformers: .*1.00e-02.*nothing was written'):
    import_folder(saved, tmp_path / 'run', check=Check('transformers'))
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_a_folder_that_transformers_cannot_load_is_an_error_line(saved, tmp_path, monkeypatch):
  values = json.loads((saved / 'config.json').read_text())
  (saved / 'config.json').write_text(json.dumps(values | {'attention_dropout': 'none'}))
  with pytest.raises(UserError, match='a folder that transformers can load'):
    import_folder(saved, tmp_path / 'run', check=Check('transformers'))
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_a_run_trained_here_opens_in_transformers(tmp_path):
  run(tiny_config(write_text(tmp_path / 'text.txt'), steps=3, eval__every=0), tmp_path / 'run', tmp_path / 'cache')
  words = export_run(tmp_path / 'run', tmp_path / 'out', dtype='bfloat16', check=Check('transformers'))
  assert float(words.split('largest difference of logits ')[1].split()[0]) < 1e-5
  model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'out')
  assert model.dtype == torch.bfloat16 and model.config.eos_token_id == 1
  assert 'generation_config.json' in files_below(tmp_path / 'out')
