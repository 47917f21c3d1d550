"""gptjax as a library: what `import gptjax` does and offers, the inside of a forward pass, and parts of one's own."""

import dataclasses
import inspect
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import ROOT
from documented import commands_of
from tiers import full

import gptjax
from gptjax import config as configs
from gptjax.config import ComputeConfig, UserError
from gptjax.inference import activations
from gptjax.inference.forward import put_batch
from gptjax.interop import Check, export_run
from gptjax.model import Block, abstract_model, positions_of
from gptjax.training import make_objective, make_optimizer

OWN = {'objective.kind': 'examples.own_objective:make_focal', 'model.block': 'examples.own_block:ParallelBlock',
       'optimizer.name': 'examples.own_optimizer:make_sgd', 'data.source.path': 'python:examples.own_source:Sums'}
IMPORT = '''
import signal, sys
before = [signal.getsignal(number) for number in signal.Signals], sys.excepthook, sys.path[:]
import gptjax
assert before == ([signal.getsignal(number) for number in signal.Signals], sys.excepthook, sys.path)
assert [name for name in sys.modules if name.startswith(('gptjax', 'jax', 'numpy', 'absl'))] == ['gptjax']
assert {*gptjax.__all__} < {*dir(gptjax)} and not hasattr(gptjax, 'nothing')
gptjax.load_config('configs/default.py')
assert 'jax' not in sys.modules and before[0] == [signal.getsignal(number) for number in signal.Signals]
'''


def test_an_import_changes_nothing_and_takes_no_time():
  done = subprocess.run([sys.executable, '-c', IMPORT], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_explained():
  page = (ROOT / 'docs/library.md').read_text()
  table = page[:page.index('\n## ')]
  assert {*re.findall(r'`(\w+)[`(]', table)} >= {*gptjax.__all__} and 'ten names' in table and len(gptjax.__all__) == 10
  for name in gptjax.__all__:
    assert inspect.getdoc(getattr(gptjax, name)), name


def test_the_examples_are_short():
  assert len(commands_of('docs/library.md', 'python')) < 50 and len(first_example()) <= 20
  files = [*(ROOT / 'examples').glob('own_*.py')]
  assert len(files) == 4 and all(len(file.read_text().splitlines()) <= 60 for file in files)


def first_example():
  return re.search(r'^```python\n(.*?)^```', (ROOT / 'docs/library.md').read_text(), re.MULTILINE | re.DOTALL)[1].splitlines()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp('home')
  tiny.write_text(folder / 'text.txt')
  return folder


@pytest.fixture(scope='module')
def settings(home):
  """A config that GPT-2's folders can hold, on one device."""
  return tiny.config(home / 'text.txt', eval__every=0)


@pytest.fixture(scope='module')
def fitted(settings, home):
  return gptjax.fit(settings, home / 'run', home / 'cache', log_every=1)


def test_steps_one_by_one_are_those_of_a_run(settings, home, fitted):
  trainer = gptjax.Trainer(settings, home / 'cache')
  first = [trainer.step() for _ in range(3)]
  logged = [record for record in tiny.records(home / 'run') if 'loss' in record]
  assert [one['loss'] for one in first] == [one['loss'] for one in logged[:3]]
  assert first[0]['targets'] == 4 * 16 and not first[0]['bad']
  # A batch of one's own is learned, and the model is that of the last step.
  ids = np.arange(4 * 16, dtype=np.int32).reshape(4, 16) % 7
  batch = {'tokens': ids, 'targets': (ids + 1) % 7, 'mask': np.ones(ids.shape, np.float32)}
  before = trainer.model.forward(ids).logits
  losses = [trainer.step(batch)['loss'] for _ in range(5)]
  assert losses[-1] < losses[0] and trainer.model.step == 8
  assert not np.array_equal(before, trainer.model.forward(ids).logits)


def test_a_run_is_loaded_evaluated_and_sampled_from(settings, home, fitted, capsys):
  model = gptjax.load(home / 'run')
  tokens = model.tokenizer.encode('a lazy dog')
  np.testing.assert_array_equal(model.forward(tokens).logits, fitted.forward(tokens).logits)
  assert model.step == 8 and model.config == fitted.config and gptjax.load_config(home / 'run') == model.config
  scores = model.evaluate(cache_dir=home / 'cache')
  np.testing.assert_allclose(scores.overall.loss, tiny.records(home / 'run')[-1]['eval/valid/loss'], 1e-5)
  other = model.evaluate({'own': str(home / 'text.txt')}, cache_dir=home / 'cache')
  assert [*other.sets] == ['own'] and other.overall.tokens > 5 * scores.overall.tokens
  one, two = model.generate('a lazy', 'the', max_tokens=5, temperature=0.5, seed=3)
  [again] = model.generate('the', max_tokens=5, temperature=0.5, seed=4)
  assert len(one.ids) == 5 and two.ids == again.ids and not model.generate()
  capsys.readouterr()
  assert model.generate('a' * 999, max_tokens=1) and 'tokens, truncated to the last' in capsys.readouterr().err
  ids = [*model.tokenizer.start_ids, *model.tokenizer.encode('a lazy'), *one.ids]
  logs = jax.nn.log_softmax(model.forward(ids).logits[0])
  np.testing.assert_allclose(one.logprobs, [logs[place - 1, ids[place]] for place in range(len(ids) - 5, len(ids))], 1e-4)


def test_a_hugging_face_folder_is_loaded_without_a_workdir(home, fitted):
  export_run(home / 'run', home / 'folder', check=Check('none'))
  model = gptjax.load(home / 'folder', context=12)
  tokens = fitted.tokenizer.encode('the fox')
  np.testing.assert_allclose(model.forward(tokens).logits, fitted.forward(tokens).logits, atol=1e-5)
  assert model.model.context == 12 and model.tokenizer.decode(tokens) == 'the fox' and model.step == 0
  assert not list(home.glob('folder*/checkpoints'))


def test_a_model_begins_as_a_run_does(settings, home, fitted):
  model = gptjax.init(settings, fitted.tokenizer)
  theirs = gptjax.Trainer(settings, home / 'cache').model
  assert repr(model) == repr(theirs) and 'Model of 4,080 parameters' in repr(model)
  for name, value in theirs.parameters.items():
    np.testing.assert_array_equal(model.parameters[name], value)


def test_a_tokenizer_is_trained_on_texts(tmp_path):
  tokenizer = gptjax.train_tokenizer([(ROOT / 'LICENSE').read_text()], kind='bpe', vocab_size=320)
  tokenizer.save(tmp_path / 'tokenizer')
  loaded = gptjax.load_tokenizer(tmp_path / 'tokenizer')
  assert loaded.vocab_size == 320 and loaded.decode(loaded.encode('the License')) == 'the License'


def test_a_mistake_is_one_line(home, fitted):
  for call, message in (
      (lambda: fitted.forward([[99]]), 'tokens: 99, expected: ids of the model, 0 to '),
      (lambda: fitted.forward(np.zeros((1, 17))), "tokens: '17 per row', expected: 1 to 16"),
      (lambda: gptjax.load(home), 'path: .*, expected: the workdir of a run or a Hugging Face folder'),
      (lambda: gptjax.init(fitted.config, fitted.tokenizer).evaluate(), 'sets: {}, expected: NAME: PATH'),
      (lambda: gptjax.load_config('', widht=3), "widht: 3, expected: .*did you mean model.width?"),
      (lambda: gptjax.Trainer(gptjax.load_config('configs/addition_grpo.py', init_from='')), "objective.kind: 'grpo', expected: ")):
    with pytest.raises(UserError, match=f'^{message}'):
      call()


@pytest.mark.parametrize('mesh', ['1x1', full('4x2')], indirect=True)
def test_hidden_states_and_attention_weights_are_those_of_the_model(style, mesh, random_parameters):
  config = dataclasses.replace(style, window=3, global_every=2) if style.positions == 'rope' else style
  described = abstract_model(config, ComputeConfig(), 16)
  parameters = random_parameters(described)
  tokens = put_batch(mesh, {'tokens': np.random.default_rng(0).integers(0, 50, (8, 11), np.int32)})['tokens']
  logits, states, weights = activations(described, mesh, True, True)(parameters, tokens)
  assert logits.shape == (8, 11, 50) and {x.shape for x in states} == {(8, 11, 32)} and len(states) == 3 and len(weights) == 2
  causal = np.tri(11, dtype=bool)
  for layer, one in enumerate(map(np.asarray, weights)):
    assert one.shape == (8, 4, 11, 11)
    np.testing.assert_allclose(one.sum(-1), 1, 1e-5)
    seen = causal if config.sees_all(layer) else causal & ~np.tri(11, k=-3, dtype=bool)
    assert (one[..., ~seen] == 0).all() and (one[..., seen] > 0).all()
  if mesh.size > 1:
    return

  @jax.jit
  def expected(parameters, states, weights):
    module, positions = described.merge(parameters), positions_of({'tokens': tokens})
    rows = [x.reshape(88, -1) for x in states]
    outputs, mixed = [], []
    for layer, (block, x, one) in enumerate(zip(module.blocks, rows, weights)):
      x = block.attention_norm(x)
      outputs.append(block.attention(x, layer, positions, None, None, None)[0])
      values = jnp.repeat(block.attention.v(x).reshape(8, 11, config.key_heads, -1), 4 // config.key_heads, 2)
      mixed.append(block.attention.out(jnp.einsum('bhts,bshc->bthc', one, values).reshape(88, -1)))
    last = module.head.logits(module.norm(rows[-1]))[:, :50]
    return module(tokens)[..., :50], last, module.embed(tokens, positions, None), outputs, mixed

  whole, last, embedded, outputs, mixed = expected(parameters, states, weights)
  np.testing.assert_allclose(whole, logits, atol=1e-5)
  np.testing.assert_allclose(last.reshape(logits.shape), logits, atol=1e-5)
  np.testing.assert_allclose(embedded.reshape(8, 11, -1), states[0], atol=1e-6)
  for output, own in zip(outputs, mixed):  # weights times values are what attention returns
    np.testing.assert_allclose(own, output, atol=1e-5)


def test_layers_may_be_stacked_and_rows_are_any_number():
  found = []
  for scan in (False, True):
    config = gptjax.load_config('', {'compute.scan': scan, 'data.context': 16, 'model.layers': 2, 'model.width': 16, 'model.heads': 2})
    model = gptjax.init(config, types.SimpleNamespace(vocab_size=50))
    found.append(model.forward(np.arange(15).reshape(3, 5), hidden_states=True, attentions=True))  # on eight devices
  assert found[0].logits.shape == (3, 5, 50) and [x.shape for x in found[0].attentions] == 2 * [(3, 2, 5, 5)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def test_parts_of_ones_own_train_and_are_named_by_the_workdir(home):
  config = gptjax.load_config('configs/experiment.py', {
    **OWN, 'model.layers': 1, 'model.width': 16, 'model.heads': 2, 'data.context': 16, 'optimizer.warmup': 2, 'mesh.data': 1,
    'optimizer.peak_lr': 0.3}, steps=8)
  model = gptjax.fit(config, home / 'own', home / 'cache', log_every=1)
  losses = [record['loss'] for record in tiny.records(home / 'own') if 'loss' in record]
  assert losses[-1] < losses[0] - 0.3 and not any('mlp_norm' in name for name in model.parameters)
  scores = gptjax.load(home / 'own').evaluate(cache_dir=home / 'cache')
  np.testing.assert_allclose(scores.overall.loss, tiny.records(home / 'own')[-1]['eval/valid/loss'], 1e-5)
  assert '"kind": "examples.own_objective:make_focal"' in (home / 'own/config.json').read_text()
  assert len(model.forward([1, 2, 3], attentions=True).attentions) == 1 and model.generate('1 +', max_tokens=3)[0].ids


@pytest.mark.parametrize('field, use', [
  ('objective.kind', make_objective), ('optimizer.name', lambda config: make_optimizer(config.optimizer)),
  ('model.block', lambda config: abstract_model(config.model, config.compute, 16)),
  ('data.source.path', lambda config: gptjax.Trainer(config))])
def test_a_missing_part_is_a_line_that_names_it(field, use):
  prefix = 'python:' if field == 'data.source.path' else ''
  for name, why in (('gone_module:thing', "No module named 'gone_module'"), ('examples.sweep:thing', "has no attribute 'thing'")):
    config = configs.override(configs.Config(), {field: prefix + name})
    with pytest.raises(UserError, match=rf"^{field}: '{name}', expected: .*MODULE:NAME .*{why}\)$"):
      use(config)
  if not prefix:
    with pytest.raises(UserError, match=rf"^{field}: 'misspelled', expected: .*MODULE:NAME"):
      configs.override(configs.Config(), {field: 'misspelled'})


def test_a_part_that_is_defined_again_is_used(monkeypatch):
  def define(scale):
    class Again(Block):
      def __call__(self, x, *more):
        x, *rest = super().__call__(x, *more)
        return x * scale, *rest
    monkeypatch.setattr(sys.modules['__main__'], 'Again', Again, raising=False)
  config = configs.override(configs.Config(), {'model.block': '__main__:Again', 'model.layers': 1, 'model.width': 8, 'model.heads': 1})
  found = []
  for scale in (1, 2):
    define(scale)
    model = gptjax.init(config, types.SimpleNamespace(vocab_size=8))
    found.append(model.forward([1, 2, 3], hidden_states=True).hidden_states[-1])
  np.testing.assert_allclose(2 * found[0], found[1], 1e-6)
