"""Answers to the harness: the log-likelihoods of our own scorers, on ids encoded as in its torch backend."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from small_stores import make_store

from gptjax.config import ComputeConfig, ModelConfig, UserError
from gptjax.data import EvalRows
from gptjax.data.tokenizers import ByteTokenizer, CharTokenizer
from gptjax.evaluation import LikelihoodScorer, Request, Scorer
from gptjax.inference import Generator, Sampling
from gptjax.model import abstract_model
from gptjax.training import next_token

pytest.importorskip('lm_eval')

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from gptjax.evaluation import harness, tasks  # noqa: E402

CONTEXT = 32
TASKS = Path(__file__).parents[2] / 'configs' / 'tasks'
TOKENIZER = ByteTokenizer()


@pytest.fixture
def transformer():
  config = ModelConfig(layers=1, width=16, heads=2, vocab_size=TOKENIZER.vocab_size, positions='rope')
  return abstract_model(config, ComputeConfig(), CONTEXT)


@pytest.fixture
def model(transformer, random_parameters, one_device):
  """The adapter, with random parameters."""
  found = harness.HarnessModel(transformer, one_device, TOKENIZER, 128, add_bos=False)
  found.use(random_parameters(transformer))
  return found


@pytest.fixture
def scored(transformer, random_parameters, one_device):
  """A function of pairs of ids: their nats."""
  scorer, parameters = LikelihoodScorer(transformer, one_device, 128), random_parameters(transformer)
  return lambda *asked: [one.nats for one in scorer(parameters, [Request(*one) for one in asked])]


def ids(text):
  return TOKENIZER.encode(text).tolist()


def requests(kind, *arguments):
  return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]


def test_pairs_become_ids_as_in_the_torch_backend(model, scored):
  long = 'The end of this is all that the model can read'
  got = model.loglikelihood(requests('loglikelihood', ('one', ' two'), ('one  ', 'two'), ('', 'two'), ('  ', 'x'), (long, ' twice')))
  want = scored((ids('one'), ids(' two')), (ids('one'), ids('  two')), ([TOKENIZER.bos_id], ids('two')), ([TOKENIZER.bos_id], ids('  x')),
                (ids(long)[-(CONTEXT + 1 - 6):], ids(' twice')))
  np.testing.assert_allclose([nats for nats, _ in got], want, rtol=1e-5)


@pytest.mark.parametrize('add_bos', [True, None])
def test_a_bos_comes_where_the_tokenizer_or_the_user_wants_one(add_bos, transformer, random_parameters, one_device, scored):
  model = harness.HarnessModel(transformer, one_device, TOKENIZER, 128, add_bos)
  model.use(random_parameters(transformer))
  got = model.loglikelihood(requests('loglikelihood', ('one', ' two'), ('', 'two')))
  want = scored(([TOKENIZER.bos_id, *ids('one')], ids(' two')), ([TOKENIZER.bos_id], ids('two')))
  np.testing.assert_allclose([nats for nats, _ in got], want, rtol=1e-5)


@pytest.mark.parametrize('text', ['short', 'a text that is as long as two rows of the model are, to the byte'])
def test_rolling_likelihoods_are_the_scorers_losses(text, model, scored, transformer, random_parameters, one_device, tmp_path):
  (nats,) = model.loglikelihood_rolling(requests('loglikelihood_rolling', (text,)))
  store = make_store(tmp_path / 'store', [len(ids(text)) + 1], vocab_size=259, draw=lambda count: np.array([0, *ids(text)]))
  score = Scorer(transformer, next_token(), one_device, 2)(random_parameters(transformer), EvalRows(store, CONTEXT, True))
  # The scorer counts the end of the document too, which stands alone in a row after full ones.
  rest = len(text) % CONTEXT
  (end,) = scored(([TOKENIZER.bos_id, *ids(text)] if rest else ids(text)[-1:], [TOKENIZER.eos_id]))
  np.testing.assert_allclose(nats + end, -score.loss * score.tokens, rtol=1e-5)


def test_generated_text_ends_at_stop_strings_and_limits(model, transformer, random_parameters, one_device):
  generator = Generator(transformer, one_device, TOKENIZER)
  weights = generator.prepare(random_parameters(transformer))
  free = [generator(weights, [ids(text)[-16:]], max_tokens=16, sampling=Sampling(0.0))[0].text for text in ('one', 'two' * 20)]
  stop = free[0][5:7]
  got = model.generate_until(requests(
    'generate_until', ('one', {'until': ['no such text'], 'max_gen_toks': 16}), ('two' * 20, {'max_gen_toks': 16}),
    ('one', {'until': [stop], 'max_gen_toks': 16}), ('one', {'until': stop, 'max_gen_toks': 3}), ('', {'max_gen_toks': 1})))
  assert got[:2] == free and got[2] == free[0][:free[0].find(stop)] and len(got[3]) <= 3 and free[0].startswith(got[3])
  with pytest.raises(UserError, match="^--tasks: 'max_gen_toks=32', expected: at least 1 and less than the model's context of 32"):
    model.generate_until(requests('generate_until', ('one', {'max_gen_toks': CONTEXT})))


def test_a_request_that_cannot_be_scored_is_an_error(model, transformer, one_device):
  with pytest.raises(UserError, match="^--tasks: 'a continuation of 40 tokens', expected: at most the model's context of 32"):
    model.loglikelihood(requests('loglikelihood', ('a', 'b' * 40)))
  with pytest.raises(UserError, match="^--tasks: 'one', expected: a continuation with tokens of its own"):
    model.loglikelihood(requests('loglikelihood', ('one', '')))
  letters = harness.HarnessModel(transformer, one_device, CharTokenizer('abc'), 128)
  with pytest.raises(UserError, match="^text of a task, character 1: 'z'"):
    letters.loglikelihood(requests('loglikelihood', ('a', 'z')))


@pytest.fixture
def data(tmp_path):
  """A folder with a few passages and questions, in files that begin with a byte order mark."""
  for name in ('lambada', 'piqa'):
    (tmp_path / name).mkdir()
  passages = ['the cat\u2028sat on the mat', 'a dog ran to the house', 'no bird sings at night']
  questions = [{'goal': f'goal {i}', 'sol1': f'do {"this " * i}now', 'sol2': 'do that'} for i in range(4)]
  (tmp_path / 'lambada/lambada_test.jsonl').write_text(
    ''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in passages), 'utf-8-sig')
  (tmp_path / 'piqa/valid.jsonl').write_text(''.join(json.dumps(question) + '\n' for question in questions), 'utf-8-sig')
  (tmp_path / 'piqa/valid-labels.lst').write_text('0\n1\n1\n0\n', 'utf-8-sig')
  return tmp_path


def load(data, *names, **options):
  return tasks.Tasks(names, str(TASKS), str(data), **options)


def test_local_tasks_are_scored_by_their_answers(model, data):
  results, samples = load(data, 'lambada', 'piqa')(model, samples=True)
  assert [sample['task'] for sample in samples] == ['lambada'] * 3 + ['piqa'] * 4
  passages, questions = samples[:3], samples[3:]
  assert passages[0]['arguments'] == [('the cat\u2028sat on the', ' mat')]
  assert questions[1]['arguments'] == [('Question: goal 1\nAnswer:', ' do this now'), ('Question: goal 1\nAnswer:', ' do that')]
  assert results['lambada']['perplexity'] == pytest.approx(math.exp(-np.mean([one['resps'][0][0][0] for one in passages])))
  assert results['lambada']['acc'] == np.mean([one['resps'][0][0][1] for one in passages])
  right = [np.argmax([answer[0][0] for answer in one['resps']]) == label for one, label in zip(questions, (0, 1, 1, 0))]
  assert results['piqa']['acc'] == np.mean(right)
  assert {*results['piqa']} == {'acc', 'acc_stderr', 'acc_norm', 'acc_norm_stderr', 'examples', 'fewshot', 'version'}
  results, samples = load(data, 'piqa', limit=2, fewshot=1)(model, samples=True)
  assert (len(samples), results['piqa']['examples'], results['piqa']['fewshot']) == (2, 2, 1)
  context = samples[0]['arguments'][0][0]
  assert context.endswith('\n\nQuestion: goal 0\nAnswer:') and context.count('goal') == 2 and context.count('goal 0') == 1


@pytest.mark.parametrize('ours, theirs', [('lambada', 'lambada/lambada_openai'), ('piqa', 'piqa/piqa')])
def test_local_tasks_ask_what_the_harness_does(ours, theirs):
  import lm_eval.tasks
  ours, theirs = load_yaml(TASKS / f'{ours}.yaml'), load_yaml(Path(lm_eval.tasks.__file__).parent / f'{theirs}.yaml')
  for name in ('output_type', 'doc_to_text', 'doc_to_target', 'doc_to_choice', 'metric_list'):
    assert ours.get(name) == theirs.get(name)


def test_a_mistake_with_tasks_is_one_line(data, tmp_path, monkeypatch):
  monkeypatch.setattr(tasks, 'TaskManager', lambda **values: TaskManager(**values | {'include_defaults': False}))
  with pytest.raises(UserError, match="^--tasks: 'lamdba', expected: lambada, piqa in .*; did you mean lambada"):
    load(data, 'lamdba')
  with pytest.raises(UserError, match=r'^--task_data: None, expected: a folder with the data of piqa \(piqa/valid.jsonl'):
    load('', 'piqa')
  with pytest.raises(UserError, match="^--task_path: 'nowhere', expected: a folder of task files"):
    tasks.Tasks(['piqa'], 'nowhere')
  (data / 'piqa/valid-labels.lst').write_text('0\n')
  with pytest.raises(UserError, match="^--tasks: 'piqa', expected: a task that can be loaded .*4 questions in piqa/valid.jsonl, 1 labels"):
    load(data, 'piqa')


def test_unknown_settings_of_a_task_are_an_error(model):
  ask = lambda **settings: model.generate_until(requests('generate_until', ('one', {'until': ['x'], 'max_gen_toks': 4, **settings})))
  with pytest.raises(UserError, match="^--tasks: 'num_beams=4', expected: a task that generates with until, max_gen_toks"):
    ask(num_beams=4)
  assert ask(num_beams=1) == ask() != ask(repetition_penalty=1e-3)


def test_standard_errors_belong_to_their_metrics():
  output = {'n-samples': {'t': {'effective': 3}}, 'n-shot': {'t': 0}, 'versions': {'t': 1}}
  found = tasks._result('t', {'alias': 't', 'acc,none': 0.5, 'acc_stderr,none': 0.1, 'em,strict': 0.25, 'em_stderr,strict': 0.2}, output)
  assert found == {'acc': 0.5, 'acc_stderr': 0.1, 'em,strict': 0.25, 'em,strict_stderr': 0.2, 'examples': 3, 'fewshot': 0, 'version': 1}
