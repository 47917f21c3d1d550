"""A folder becomes a run, and the run the same folder, bit by bit, on any mesh; a conversion that fails leaves nothing."""

import json

import jax
import numpy as np
import pytest
from tiers import full
from tiny import config as tiny_config
from tiny import files_below, run, small_disk, write_text

from gptjax.checkpoint import Checkpoints, Progress, Retention, load_trained
from gptjax.checkpoint.staging import HostStaging
from gptjax.config import ComputeConfig, MeshConfig, UserError, exit_status, to_json
from gptjax.data import open_held_out
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.inference import Generator
from gptjax.interop import FAMILIES, Check, Fields, export_run, import_folder, parse_config
from gptjax.interop.comparison import compare_logits
from gptjax.interop.importing import load_parameters
from gptjax.interop.matching import Match, bits, match
from gptjax.interop.tensor_files import DTYPES, Entry, Writer, read_tensors
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh

VOCABULARY = 261  # no multiple of 8: rows are padded
GPT2 = {'vocab_size': VOCABULARY, 'n_positions': 16, 'n_embd': 16, 'n_layer': 3, 'n_head': 4}
DECODER = {'vocab_size': VOCABULARY, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 3, 'num_attention_heads': 4,
           'num_key_value_heads': 2, 'max_position_embeddings': 16, 'head_dim': 8}
CASES = [('gpt2', GPT2), ('gpt2', GPT2 | {'tie_word_embeddings': False}),
         *((name, DECODER) for name in FAMILIES if name != 'gpt2'), ('llama', DECODER | {'tie_word_embeddings': True})]
WAYS = [('F32', MeshConfig(1), True), ('BF16', MeshConfig(4, 2), False), ('F16', MeshConfig(2, 4), True)]
ROUNDTRIP = Check('roundtrip')


def make_folder(folder, family, fields, dtype='F32', rename=lambda name: name, more=None, shard_bytes=20_000):
  """A folder of a family with random tensors; `more`: others, as {name: array}."""
  kind = FAMILIES[family]
  values = {'architectures': [kind.architecture], 'model_type': family, 'torch_dtype': 'float32', 'other': [1, None], **fields}
  config, context = kind.read(Fields(values))
  matched = match(kind, abstract_model(config, ComputeConfig(), context), context)
  rng = np.random.default_rng(0)
  arrays = {tensor.name: (0.2 * rng.standard_normal(matched.shape(tensor), np.float32)).astype(DTYPES[dtype]) for tensor in matched.tensors}
  arrays |= {} if more is None else more(arrays)
  arrays = {rename(name): value for name, value in arrays.items()}
  folder.mkdir()
  names = {dtype: name for name, dtype in DTYPES.items()}
  writer = Writer(folder, {name: Entry(names[value.dtype], value.shape) for name, value in arrays.items()}, shard_bytes)
  for name, value in arrays.items():
    writer.write(name, value)
  writer.finish()
  (folder / 'config.json').write_text(json.dumps(values))
  (folder / 'generation_config.json').write_text('{"temperature": 0.6}')
  (folder / 'chat_template.jinja').write_text('{{ messages }}')
  ByteTokenizer().save_hugging_face(folder)
  (folder / 'pytorch_model.bin').write_bytes(b'never read, never copied')
  return folder


def assert_same_folders(one, other):
  """Tensors bit by bit, and everything beside them."""
  ours, theirs = read_tensors(one), read_tensors(other)
  assert ours.keys() == theirs.keys()
  for name in ours:
    assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
    assert np.array_equal(bits(ours[name].view()), bits(theirs[name].view())), name
  words = [{name for name in files_below(folder) if not name.startswith(('model', 'pytorch'))} for folder in (one, other)]
  assert words[0] == words[1] and len(words[0]) == 5
  for name in words[0]:
    texts = [(folder / name).read_text() for folder in (one, other)]
    assert texts[0] == texts[1] or json.loads(texts[0]) == json.loads(texts[1]), name


@pytest.mark.parametrize('family, fields, ways', [(*case, WAYS[index % 3]) for index, case in enumerate(CASES)])
def test_a_folder_is_unchanged_after_import_and_export(tmp_path, family, fields, ways):
  dtype, mesh, scan = ways
  source = make_folder(tmp_path / 'in', family, fields, dtype)
  import_folder(source, tmp_path / 'run', mesh=mesh, scan=scan, check=ROUNDTRIP)
  export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP, shard_bytes=30_000)
  assert_same_folders(source, tmp_path / 'out')


@pytest.mark.parametrize('more, rename', [
  (lambda arrays: {'lm_head.weight': arrays['transformer.wte.weight']}, lambda name: name),
  (lambda arrays: {f'transformer.h.{i}.attn.bias': np.tril(np.ones((1, 1, 16, 16), np.bool_)) for i in range(3)},
   lambda name: name.removeprefix('transformer.'))])
def test_tied_heads_short_names_and_buffers_are_unchanged(tmp_path, more, rename):
  source = make_folder(tmp_path / 'in', 'gpt2', GPT2, 'BF16', rename, more)
  import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP)
  assert_same_folders(source, tmp_path / 'out')


def test_buffers_of_any_family_and_absent_ids_are_unchanged(tmp_path):
  names = ['model.layers.0.self_attn.rotary_emb.inv_freq', 'model.rotary_emb.inv_freq', 'model.position_ids']
  fields = {'pad_token_id': -1, 'eos_token_id': [1, -1], 'bos_token_id': None}
  source = make_folder(tmp_path / 'in', 'mistral', DECODER | fields, more=lambda arrays: {name: np.ones(4, np.float32) for name in names})
  import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  tokenizer = open_held_out(tmp_path / 'run' / 'data').tokenizer
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids) == (0, 1, (1,))  # those of tokenizer_config.json
  export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP)
  assert_same_folders(source, tmp_path / 'out')


@pytest.mark.parametrize('scan', [False, True])
def test_each_device_reads_its_own_part(tmp_path, monkeypatch, scan):
  source = make_folder(tmp_path / 'in', 'llama', DECODER)
  kind = FAMILIES['llama']
  config, context = kind.read(Fields(DECODER))
  entries = read_tensors(source)
  matched = match(kind, abstract_model(config, ComputeConfig(scan=scan), context), context, entries)
  complete = load_parameters(matched, make_mesh(MeshConfig(1, 1), jax.devices()[:1]), entries)
  read, sizes = Match.read, []
  monkeypatch.setattr(Match, 'read', lambda *args: sizes.append(read(*args)) or sizes[-1])
  parts = load_parameters(matched, make_mesh(MeshConfig(4, 2)), entries)
  for name, parameter in parts.items():
    np.testing.assert_array_equal(parameter, complete[name])
  matrices = [name for name in parts if parts[name].ndim == 2 + (scan and name.startswith('blocks'))]
  assert all(part.data.size < parts[name].size for name in matrices for part in parts[name].addressable_shards)
  asked = sum(value.size for value in sizes)
  assert asked < 8 * sum(parameter.size for parameter in parts.values()) / 3


def test_an_imported_run_is_a_run(tmp_path, monkeypatch):
  monkeypatch.delattr(HostStaging, 'copy')  # an import has memory for one copy of the parameters only
  source = make_folder(tmp_path / 'in', 'llama', DECODER)
  import_folder(source, tmp_path / 'run', context=8, check=ROUNDTRIP)
  trained = load_trained(tmp_path / 'run')
  assert trained.step == 0 and trained.config.data.context == 8
  table = read_tensors(source)['model.embed_tokens.weight'].view()
  ours = np.asarray(trained.parameters['tokens/table'])
  assert np.array_equal(ours[:VOCABULARY], table) and ours.shape[0] == 264 and not ours[VOCABULARY:].any()
  held_out = open_held_out(tmp_path / 'run' / 'data')
  assert held_out.valid == {} and held_out.tokenizer.decode(held_out.tokenizer.encode('text')) == 'text'


def test_positions_that_are_not_imported_are_not_exported(tmp_path):
  source = make_folder(tmp_path / 'in', 'gpt2', GPT2)
  import_folder(source, tmp_path / 'run', context=8, check=ROUNDTRIP)
  export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP)
  was, now = read_tensors(source)['transformer.wpe.weight'], read_tensors(tmp_path / 'out')['transformer.wpe.weight']
  assert np.array_equal(now.view(), was.view()[:8]) and json.loads((tmp_path / 'out' / 'config.json').read_text())['n_positions'] == 8


def test_changed_parameters_are_exported_in_the_requested_dtype(tmp_path):
  source = make_folder(tmp_path / 'in', 'llama', DECODER, 'BF16')
  import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  change(tmp_path / 'run', lambda value: value + 1e-3)
  for dtype, name in (('auto', 'BF16'), ('float16', 'F16'), ('float32', 'F32')):
    export_run(tmp_path / 'run', tmp_path / dtype, dtype=dtype, check=ROUNDTRIP)
    norm = read_tensors(tmp_path / dtype)['model.norm.weight'], read_tensors(source)['model.norm.weight']
    assert norm[0].dtype == name
    np.testing.assert_array_equal(norm[0].view(), (norm[1].view().astype(np.float32) + np.float32(1e-3)).astype(DTYPES[name]))
    wanted = 'float32' if dtype == 'auto' else dtype
    assert json.loads((tmp_path / dtype / 'config.json').read_text())['torch_dtype'] == wanted


def change(workdir, function):
  """Saves another checkpoint, of step 1."""
  parameters = {name: function(value) for name, value in load_trained(workdir).parameters.items()}
  checkpoints = Checkpoints(workdir / 'checkpoints', Retention())
  checkpoints.save(Progress(1), {'trained': parameters}, None)
  checkpoints.close()


def test_values_too_large_for_float16_are_an_error(tmp_path):
  import_folder(make_folder(tmp_path / 'in', 'llama', DECODER), tmp_path / 'run', check=ROUNDTRIP)
  change(tmp_path / 'run', lambda value: value + 1e6)
  with pytest.raises(UserError, match='float16'):
    export_run(tmp_path / 'run', tmp_path / 'out', dtype='float16', check=ROUNDTRIP)
  assert not [name for name in files_below(tmp_path) if name.startswith('out')]


def test_a_roundtrip_that_differs_leaves_nothing(tmp_path, monkeypatch):
  source = make_folder(tmp_path / 'in', 'llama', DECODER)
  read = Match.read
  monkeypatch.setattr(Match, 'read', lambda self, entries, name, index: read(self, entries, name, index) + (name == 'norm/gain'))
  with pytest.raises(UserError, match='model.norm.weight'):
    import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
  source = make_folder(tmp_path / 'in', 'llama', DECODER)
  def interrupt(*args):
    raise KeyboardInterrupt
  monkeypatch.setattr(Match, 'write', interrupt)
  with pytest.raises(KeyboardInterrupt):
    import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  assert [path.name for path in tmp_path.iterdir()] == ['in']


NORM = 'model.layers.1.input_layernorm.weight'
MISTAKES = {
  'missing': (lambda arrays: arrays.pop(NORM) is None or {}, {}, {}, f'{NORM}: None'),
  'extra': (lambda arrays: {'model.layers.3.up.weight': np.ones(3, np.float32)}, {}, {}, 'model.layers.3.up.weight'),
  'shape': (lambda arrays: {NORM: np.ones(17, np.float32)}, {}, {}, rf'{NORM}: \[17\], expected: shape \[16\]'),
  'type': (lambda arrays: {NORM: np.ones(16, np.int32)}, {}, {}, f"{NORM}: 'I32', expected: F32, BF16, F16"),
  'tied head': (lambda arrays: {'lm_head.weight': arrays['model.embed_tokens.weight'] + 1}, {'tie_word_embeddings': True}, {},
                'lm_head.weight'),
  'context': (None, {}, {'context': 17}, '--context: 17, expected: 1 to 16'),
  'architecture': (None, {'model_type': 'mamba'}, {}, 'model_type'),
  'no name': (None, {'model_type': ['llama']}, {}, "model_type: .*llama.*expected: gpt2"),
  'vocabulary': (None, {'vocab_size': 258}, {}, 'in: largest token id of a text: 258, expected: below 258, the vocab_size in '),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_folder_that_does_not_fit_is_an_error(tmp_path, mistake):
  more, fields, options, message = MISTAKES[mistake]
  source = make_folder(tmp_path / 'in', 'llama', DECODER if 'model_type' in fields else DECODER | fields, more=more)
  values = json.loads((source / 'config.json').read_text()) | fields
  (source / 'config.json').write_text(json.dumps(values))
  with pytest.raises(UserError, match=message):
    import_folder(source, tmp_path / 'run', check=ROUNDTRIP, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['in']


def test_the_tokenizer_may_have_more_special_ids_than_the_model(tmp_path):
  """As Gemma 3's has for images, which a text model does not read."""
  source = make_folder(tmp_path / 'in', 'llama', DECODER | {'vocab_size': 259})
  described = json.loads((source / 'tokenizer.json').read_text())
  image = {**described['added_tokens'][0], 'id': 259, 'content': '<image>'}
  (source / 'tokenizer.json').write_text(json.dumps(described | {'added_tokens': [*described['added_tokens'], image]}))
  import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  trained, tokenizer = load_trained(tmp_path / 'run'), open_held_out(tmp_path / 'run' / 'data').tokenizer
  assert trained.config.model.vocab_size == 259 and tokenizer.vocab_size == 260
  generator = Generator(trained.model, trained.mesh, tokenizer)
  with pytest.raises(UserError, match='^--stop_ids: 259, expected: ids of the model, 0 to 258'):
    generator.ends([1, 259])
  export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP)
  assert_same_folders(source, tmp_path / 'out')
  (source / 'chat_template.jinja').write_text('{{ messages[0].content }}<image>')  # so that a conversation has it
  with pytest.raises(UserError, match='in: largest token id of a text: 259, expected: below 259, the vocab_size in '):
    import_folder(source, tmp_path / 'other', check=ROUNDTRIP)


def test_a_folder_without_a_tokenizer_needs_another_one(tmp_path):
  source = make_folder(tmp_path / 'in', 'llama', DECODER)
  (source / 'tokenizer.json').unlink()
  ByteTokenizer().save(tmp_path / 'other')
  with pytest.raises(UserError, match='in: tokenizer: None, expected: one of tokenizer.json, .* by --tokenizer of tools.import_hf$'):
    import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  import_folder(source, tmp_path / 'run', check=ROUNDTRIP, tokenizer=tmp_path / 'other')
  assert open_held_out(tmp_path / 'run' / 'data').tokenizer.kind == 'bytes'


@pytest.mark.parametrize('model', [
  full({}), {'compute__scan': True, 'model__positions': 'rope', 'model__norm': 'rmsnorm', 'model__mlp': 'swiglu', 'model__bias': False,
       'model__tied': False, 'model__kv_heads': 1, 'model__mup_base': 8}])
def test_a_run_trained_here_becomes_a_folder_of_its_family(tmp_path, model):
  settings = tiny_config(write_text(tmp_path / 'text.txt'), steps=2, optimizer__warmup=1, eval__every=0, **model)
  run(settings, tmp_path / 'run', tmp_path / 'cache')
  export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP)
  values = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert values['architectures'] == [FAMILIES['llama' if model else 'gpt2'].architecture]
  assert values['torch_dtype'] == 'float32' and 'dtype' not in values  # transformers 4 and 5 read it
  ids = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
  assert ids == {'bos_token_id': 1, 'eos_token_id': 1, 'pad_token_id': 0} and ids.items() <= values.items()
  import_folder(tmp_path / 'out', tmp_path / 'again', check=ROUNDTRIP, scan=bool(model))
  one, other = (load_trained(tmp_path / name).parameters for name in ('run', 'again'))
  assert one.keys() == other.keys()
  rows = open_held_out(tmp_path / 'run' / 'data').tokenizer.vocab_size
  for name in one:  # padded rows are not in the folder
    cut = {'tokens/table': np.s_[:rows], 'lm_head/kernel': np.s_[:, :rows]}.get(name, np.s_[:])
    np.testing.assert_array_equal(one[name][cut], other[name][cut])


def test_a_model_that_no_family_can_describe_is_an_error(tmp_path):
  ByteTokenizer().save(tmp_path / 'run' / 'data' / 'tokenizer')
  settings = tiny_config('text.txt', model__mlp='geglu', model__vocab_size=VOCABULARY)
  (tmp_path / 'run' / 'config.json').write_text(to_json(settings))  # a run without a checkpoint: the config is checked first
  with pytest.raises(UserError, match='model: .*mlp=geglu'):
    export_run(tmp_path / 'run', tmp_path / 'out', check=ROUNDTRIP)
  assert not [name for name in files_below(tmp_path) if name.startswith('out')]


def test_logits_are_compared_with_a_tolerance():
  theirs = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
  ours = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
  divergence = (0.9 * np.log(1.8) + 0.1 * np.log(0.2)) / 2
  assert f'logits {np.log(5):.2e} of {-np.log(0.1):.1f}, mean KL {divergence:.2e} nats' in compare_logits(ours, theirs, 2.0)
  for wrong in (ours, ours * np.float32(np.nan)):
    with pytest.raises(UserError, match='nothing was written'):
      compare_logits(wrong, theirs, 1.0)
  large = np.float32([[0, 100]])
  assert compare_logits(large + np.float32([[0, 0.009]]), large, 1e-3)  # 1e-4 of the largest logit is allowed


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of Orbax's threads
def test_a_full_disk_leaves_nothing(tmp_path):
  source = make_folder(tmp_path / 'in', 'llama', DECODER)
  import_folder(source, tmp_path / 'run', check=ROUNDTRIP)
  with small_disk(tmp_path / 'disk', '64k') as disk:
    for convert in (lambda: import_folder(source, disk / 'run', check=ROUNDTRIP),
                    lambda: export_run(tmp_path / 'run', disk / 'out', check=ROUNDTRIP)):
      with pytest.raises((UserError, OSError)) as caught:
        convert()
      assert exit_status(caught.value)[0] == 2 and not files_below(disk)


@pytest.mark.parametrize('fields', [
  {'rope_scaling': {'type': 'linear'}}, {'rope_scaling': {'rope_type': 'linear', 'factor': None}}, {'rope_scaling': 'linear'},
  {'rope_parameters': {'full_attention': {}}}, {'architectures': [None]}, {'tie_word_embeddings': 'false'}, {'hidden_size': '16'},
  {'model_type': 'mistral', 'sliding_window': '4096'}], ids=str)
def test_a_config_with_wrong_types_is_one_error_line(fields):
  with pytest.raises(UserError, match='^some/config.json'):
    parse_config({'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', **DECODER, **fields}, 'some/config.json')
