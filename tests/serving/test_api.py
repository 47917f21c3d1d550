"""Clients get what OpenAI's interface promises, whoever else is served."""

import concurrent.futures
import json
import random
import socket
import time
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from served import CONTEXT, Server
from tiers import full

from gptjax.inference import Sampling


def wait(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def requests(count, seed):
  rng = random.Random(seed)
  return [{'prompt': ''.join(rng.choice('abc dé') for _ in range(rng.randrange(50))), 'max_tokens': rng.randrange(1, 30),
           'temperature': rng.choice([0, 0.7, 1.5]), 'seed': rng.randrange(9), 'top_k': rng.choice([0, 5]), 'top_p': rng.choice([1, 0.8]),
           'presence_penalty': rng.choice([0, 1.5]), 'logit_bias': rng.choice([{}, {'70': 5}]), 'ignore_eos': rng.random() < 0.5,
           'stop': rng.choice([[], ['a', 'zz']])} for _ in range(count)]


@pytest.mark.parametrize('count', [12, full(64)])
def test_texts_do_not_depend_on_their_order_and_company(server, count):
  bodies = requests(count, count)
  alone = [server.text(**body) for body in bodies]
  random.Random(1).shuffle(order := list(range(count)))
  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    together = dict(zip(order, pool.map(lambda index: server.text(**bodies[index]), order)))
  assert [together[index] for index in range(count)] == alone
  assert server.scheduler.running == server.scheduler.waiting == 0


def test_texts_are_those_of_the_generator(server):
  prompt = server.generator.prompt('naïve')
  with jax.set_mesh(server.mesh):
    expected = server.generator(server.weights, [prompt], max_tokens=30, sampling=Sampling(0.9, 20), seeds=[7])[0]
  found = server.text(prompt='naïve', max_tokens=30, temperature=0.9, top_k=20, seed=7, logprobs=0)
  assert found['text'] == expected.text and found['finish_reason'] == ('stop' if expected.ended == 'id' else 'length')
  assert np.allclose(found['logprobs']['token_logprobs'], expected.logprobs, atol=1e-5)
  assert server.text(prompt=prompt, max_tokens=30, temperature=0.9, top_k=20, seed=7)['text'] == expected.text


def test_a_conversation_reuses_what_was_read(server):
  messages, reused = [{'role': 'user', 'content': 'Hello'}], server.scheduler.counts['reused']
  body = {'messages': messages, 'temperature': 0, 'max_tokens': 5, 'ignore_eos': True}
  _, first = server.ask('/v1/chat/completions', body)
  assert first['object'] == 'chat.completion' and first['usage']['completion_tokens'] == 5
  longer = [*messages, first['choices'][0]['message'], {'role': 'user', 'content': 'And'}]
  _, second = server.ask('/v1/chat/completions', body | {'messages': longer})
  assert server.scheduler.counts['reused'] - reused >= second['usage']['prompt_tokens'] // 3
  with jax.set_mesh(server.mesh):
    prompt = server.generator.prompt(longer)
    expected = server.generator(server.weights, [prompt], max_tokens=5, sampling=Sampling(0.0), stop_ids=())[0]
  assert second['choices'][0]['message']['content'] == expected.text


def test_log_probabilities_of_a_prompt_are_those_of_a_forward_pass(server):
  ids = server.generator.prompt('what a model knows of a text that is longer than a chunk')
  found = server.text(prompt=ids, max_tokens=0, echo=True, logprobs=3)
  model = server.api._scheduler._engine._model
  with jax.set_mesh(server.mesh):
    logits = model.merge(server.weights)(jnp.array([ids]))[0]
    expected = jax.nn.log_softmax(logits)
  known = found['logprobs']
  assert known['token_logprobs'][0] is None and known['top_logprobs'][0] is None
  assert np.allclose(known['token_logprobs'][1:], [expected[at, token] for at, token in enumerate(ids[1:])], atol=1e-5)
  assert all(np.allclose(sorted(best.values(), reverse=True), np.sort(expected[at])[::-1][:3], atol=1e-5)
             for at, best in enumerate(known['top_logprobs'][1:]))
  assert found['text'] == server.tokenizer.decode(ids) and found['finish_reason'] == 'length'
  longer = server.text(prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)  # as the lm-evaluation-harness asks
  assert longer['logprobs']['token_logprobs'][:-1] == known['token_logprobs'] and len(longer['logprobs']['tokens']) == len(ids) + 1


@pytest.mark.parametrize('path', ['/v1/completions', '/v1/chat/completions'])
def test_a_stream_has_the_same_texts_in_order(server, path):
  chat = 'chat' in path
  given = {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}]} if chat else {'prompt': 'Hi'}
  body = given | {'max_tokens': 25, 'seed': 3, 'n': 2, 'stop': 'qx', **({'logprobs': True, 'top_logprobs': 2} if chat else {'logprobs': 2})}
  _, whole = server.ask(path, body)
  chunks, end = server.events(path, body | {'stream_options': {'include_usage': True}})
  assert end == 'data: [DONE]' and chunks[-1]['choices'] == [] and chunks[-1]['usage'] == whole['usage']
  assert all(chunk['usage'] is None for chunk in chunks[:-1]) and len({chunk['id'] for chunk in chunks}) == 1
  for index, choice in enumerate(whole['choices']):
    mine = [one for chunk in chunks for one in chunk['choices'] if one['index'] == index]
    assert [one['finish_reason'] for one in mine] == [None] * (len(mine) - 1) + [choice['finish_reason']]
    if chat:
      assert mine[0]['delta']['role'] == 'assistant' and mine[-1]['delta'] == {}
      text = ''.join(one['delta'].get('content', '') for one in mine)
      logprobs = [token for one in mine if one['logprobs'] for token in one['logprobs']['content']]
      assert text == choice['message']['content'] and logprobs == choice['logprobs']['content']
    else:
      assert ''.join(one['text'] for one in mine) == choice['text']
      for name, values in choice['logprobs'].items():
        assert [value for one in mine if one['logprobs'] for value in one['logprobs'][name]] == values


def test_a_stop_text_ends_wherever_tokens_end(server):
  whole = server.text(prompt='x', max_tokens=40, seed=1, ignore_eos=True)['text']
  for at in (3, 9):
    stop = whole[at:at + 2]
    found = server.text(prompt='x', max_tokens=40, seed=1, ignore_eos=True, stop=[stop])
    assert found == found | {'text': whole[:whole.index(stop)], 'finish_reason': 'stop'}


@pytest.mark.parametrize('path, body, status, words', [
  ('completions', b'{', 400, 'not JSON'), ('completions', [1], 400, 'JSON object'),
  ('completions', {'promt': 'a'}, 400, 'unknown field promt'),
  ('completions', {'prompt': 3}, 400, 'prompt must be'), ('completions', {'prompt': [10**6]}, 400, 'prompt must be'),
  ('completions', {'prompt': ''.join('a' for _ in range(CONTEXT))}, 400, 'the context 96'),
  ('completions', {'prompt': 'a', 'max_tokens': CONTEXT}, 400, 'max_tokens is 96'), ('completions', {'max_tokens': 0}, 400, 'at least 1'),
  ('completions', {'temperature': 3}, 400, 'temperature must be a number from 0 to 2'), ('completions', {'n': 0}, 400, 'n must be'),
  ('completions', {'n': True}, 400, 'n must be'), ('completions', {'logprobs': 21}, 400, 'at most 20'),
  ('completions', {'stop': ['']}, 400, 'stop'),
  ('completions', {'logit_bias': {'x': 1}}, 400, 'logit_bias'), ('completions', {'best_of': 2}, 400, 'best_of is not supported'),
  ('completions', {'suffix': 'b'}, 400, 'suffix is not supported'), ('completions', {'model': 'other'}, 404, 'there is tiny'),
  ('completions', {'stop_token_ids': [-1]}, 400, 'stop_token_ids'), ('completions', {'stream': 'yes'}, 400, 'stream must be'),
  ('chat/completions', {}, 400, 'messages must be'), ('chat/completions', {'messages': ['a']}, 400, r'messages[0]'),
  ('chat/completions', {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 400, r'messages[0]'),
  ('chat/completions', {'messages': [{'role': 'user', 'content': 'a'}], 'tools': [{}]}, 400, 'tools is not supported'),
  ('chat/completions', {'messages': [{'role': 'user', 'content': 'a'}], 'top_logprobs': 2}, 400, 'needs logprobs'),
  ('models/other', None, 404, 'there is tiny'), ('embeddings', {}, 404, 'does not exist')])
def test_mistakes_are_errors_as_openai_has_them(server, path, body, status, words):
  found, answer = server.ask(f'/v1/{path}', body)
  assert found == status and {*answer['error']} == {'message', 'type', 'param', 'code'} and words in answer['error']['message'], answer


def raw(server, body):
  """A connection that has sent a request."""
  url, data = urllib.parse.urlparse(server.url), json.dumps(body).encode()
  connection = socket.create_connection((url.hostname, url.port))
  connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s' % (len(data), data))
  return connection


@pytest.mark.parametrize('stream', [True, False])
def test_clients_that_leave_free_their_slots(server, stream):
  before = server.scheduler.counts['cancelled']
  left = [raw(server, {'prompt': 'a', 'max_tokens': 90, 'ignore_eos': True, 'stream': stream, 'n': 5}) for _ in range(3)]
  wait(lambda: server.scheduler.running)
  for connection in left:
    connection.close()
  wait(lambda: not server.scheduler.running and not server.scheduler.waiting)
  assert server.scheduler.counts['cancelled'] > before and server.text(prompt='a', max_tokens=2)


def test_a_full_queue_asks_to_come_again_and_a_key_is_needed(parts, server):
  wait(lambda: not server.scheduler.running)
  other = Server(*parts, waiting=0, key='secret')
  try:
    assert other.ask('/health')[0] == 200 and other.ask('/v1/models')[0] == 401
    key = {'Authorization': 'Bearer secret'}
    assert other.ask('/v1/models', **key)[1]['data'][0]['id'] == 'tiny'
    with pytest.raises(urllib.error.HTTPError) as refused:
      other.open('/v1/completions', {'prompt': 'a'}, **key)
    assert refused.value.code == 429 and refused.value.headers['Retry-After'] == '1'
    with other.open('/metrics', **key) as answer:
      told = answer.read().decode()
      assert 'gptjax_requests_total{end="refused"} 1\n' in told and '\ngptjax_programs_compiled_total ' in told
  finally:
    other.close()


def test_an_error_of_the_engine_ends_all_requests(parts, server, monkeypatch):
  wait(lambda: not server.scheduler.running)
  other = Server(*parts)
  try:
    def fail(*args):
      raise RuntimeError('no device')
    monkeypatch.setattr(other.scheduler._engine, 'decode', fail)
    status, answer = other.ask('/v1/completions', {'prompt': 'a'})
    assert status == 500 and 'no device' in answer['error']['message']
    wait(lambda: other.scheduler.error)
    assert other.ask('/health')[0] == 503 and other.ask('/v1/completions', {'prompt': 'a'})[0] == 503
  finally:
    monkeypatch.undo()
    other.close()


@pytest.mark.full
def test_the_page_has_nothing_from_elsewhere(server):
  with server.open('/') as answer:
    page = answer.read().decode()
  assert 'http://' not in page and 'https://' not in page and 'src=' not in page and answer.headers['Content-Type'].startswith('text/html')
