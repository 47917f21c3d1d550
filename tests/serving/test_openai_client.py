"""OpenAI's own client gets from the server what it expects: every route, field, stream and error."""

import asyncio
import itertools

import pytest
from served import CONTEXT, Server
from test_api import wait

openai = pytest.importorskip('openai')
pytestmark = pytest.mark.full
ASKED = {'model': 'tiny', 'max_tokens': 12, 'seed': 5}
LONG = {'model': 'tiny', 'max_tokens': 80, 'extra_body': {'ignore_eos': True}}
HELLO = [{'role': 'user', 'content': 'Hello'}]


@pytest.fixture(scope='module')
def client(server):
  with openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0) as client:
    yield client


@pytest.fixture(scope='module')
def write(client):
  """Writes completions."""
  return lambda prompt='Once', **fields: client.completions.create(prompt=prompt, **ASKED | fields)


@pytest.fixture(scope='module')
def talk(client):
  """Answers conversations."""
  return lambda messages=HELLO, **fields: client.chat.completions.create(messages=messages, **ASKED | fields)


@pytest.fixture(scope='module')
def bias(server):
  """A `logit_bias` of the tokens of these characters."""
  return lambda characters, value=100: {str(i): value for i in server.tokenizer.encode(characters)}


# Models


def test_models_are_listed(client):
  card, = client.models.list()
  assert (card.id, card.object, card.owned_by) == ('tiny', 'model', 'gptjax') and card.max_model_len == CONTEXT


def test_a_model_is_described(client):
  assert client.models.retrieve('tiny') == client.models.list().data[0]


def test_a_model_that_does_not_exist_is_not_found(client):
  with pytest.raises(openai.NotFoundError, match='there is tiny') as caught:
    client.models.retrieve('gpt-5')
  assert caught.value.code == 'model_not_found'


# Completions


def test_a_completion_has_every_field(write):
  found = write(max_tokens=None, extra_body={'ignore_eos': True})
  assert found.id.startswith('cmpl-') and found.object == 'text_completion' and found.model == 'tiny' and found.created > 0
  choice, = found.choices
  assert (choice.index, choice.finish_reason, choice.logprobs) == (0, 'length', None)
  assert found.usage.completion_tokens == 16 and found.usage.total_tokens == found.usage.prompt_tokens + 16


@pytest.mark.parametrize('prompt, tokens', [('', 1), ('abc', 4), ('é', 3), (['abc', 'd'], 6), ([65, 66], 2), ([[65, 66], [67]], 3)])
def test_prompts_are_texts_or_ids_alone_or_several(write, prompt, tokens):
  found = write(prompt)
  assert [choice.index for choice in found.choices] == [*range(len(prompt) if prompt and isinstance(prompt[0], (list, str))
                                                               and isinstance(prompt, list) else 1)]
  assert found.usage.prompt_tokens == tokens


def test_copies_differ_and_the_first_is_that_of_one(write):
  texts = [choice.text for choice in write(n=3).choices]
  assert len({*texts}) == 3 and texts[0] == write().choices[0].text


def test_copies_of_several_prompts_are_in_order(write):
  both = [choice.text for choice in write(['one', 'two'], n=2).choices]
  assert both == [choice.text for prompt in ('one', 'two') for choice in write(prompt, n=2).choices]


def test_echo_begins_with_the_prompt(write):
  assert write(echo=True).choices[0].text == 'Once' + write().choices[0].text


def test_echo_without_new_tokens_scores_the_prompt(write):
  found = write(echo=True, max_tokens=0, logprobs=2)
  known = found.choices[0].logprobs
  assert found.usage.completion_tokens == 0 and found.choices[0].text == 'Once' == ''.join(known.tokens)
  assert known.text_offset == [0, 1, 2, 3] and all(value < 0 for value in known.token_logprobs)
  assert all(len(best) == 2 for best in known.top_logprobs)


@pytest.mark.parametrize('count', [0, 1, 5, 20])
def test_log_probabilities_have_as_many_alternatives_as_asked(write, count):
  found = write(logprobs=count, temperature=0, extra_body={'ignore_eos': True})
  known = found.choices[0].logprobs
  assert len(known.tokens) == len(known.token_logprobs) == len(known.text_offset) == found.usage.completion_tokens == 12
  for token, value, best in zip(known.tokens, known.token_logprobs, known.top_logprobs, strict=True):
    assert best is None if not count else len(best) <= count and best[token] == value == max(best.values())


def test_echo_with_log_probabilities_has_those_of_both_parts(write):
  found = write(echo=True, logprobs=1).choices[0].logprobs
  prompt, new = write(echo=True, logprobs=1, max_tokens=0).choices[0].logprobs, write(logprobs=1).choices[0].logprobs
  assert found.tokens == prompt.tokens + new.tokens
  assert found.token_logprobs == pytest.approx(prompt.token_logprobs + new.token_logprobs, abs=1e-5)


def test_a_seed_repeats_a_text_and_others_differ(write):
  assert write().choices == write().choices and write(seed=6).choices[0].text != write().choices[0].text


def test_without_a_seed_texts_differ(write):
  assert len({write(seed=None).choices[0].text for _ in range(4)}) == 4


@pytest.mark.parametrize('greedy', [{'top_p': 1e-6}, {'extra_body': {'top_k': 1}}, {'extra_body': {'min_p': 1}}])
def test_the_narrowest_filter_is_greedy(write, greedy):
  assert write(**greedy).choices[0].text == write(temperature=0).choices[0].text


def test_a_bias_forces_a_token_or_forbids_it(write, bias):
  assert write(logit_bias=bias('X')).choices[0].text == 'X' * 12
  letters = bias('abcdefgh', 30)
  first = write(temperature=0, logit_bias=letters).choices[0].text[0]
  assert first not in write(temperature=0, max_tokens=30, logit_bias=letters | bias(first, -100)).choices[0].text


@pytest.mark.parametrize('penalty', ['presence_penalty', 'frequency_penalty'])
def test_penalties_repeat_less(write, bias, penalty):
  asked = {'temperature': 0, 'logit_bias': bias('X', 95) | bias('Y', 94) | bias('Z', 93), 'extra_body': {'ignore_eos': True}}
  assert write(**asked).choices[0].text == 'X' * 12
  assert {*write(**asked, **{penalty: 2}).choices[0].text} > {'X'}


def test_a_text_ends_with_its_end_of_text(server, write):
  found = write(logit_bias={str(server.tokenizer.eos_id): 100}, max_tokens=5)
  assert found.choices[0].text == '' and found.choices[0].finish_reason == 'stop' and found.usage.completion_tokens == 1


def test_a_text_ends_with_an_id_of_the_client(write, bias):
  found = write(logit_bias=bias('X'), extra_body={'stop_token_ids': [int(i) for i in bias('X')]})
  assert found.choices[0].text == '' and found.choices[0].finish_reason == 'stop'


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('at, size', [(0, 1), (4, 1), (3, 3), (6, 5)])
def test_a_stop_text_may_span_tokens_and_is_not_in_the_text(write, bias, at, size, stream):
  asked = {'logit_bias': bias('abcdefghijklmnop', 30), 'max_tokens': 30}
  whole = write(**asked).choices[0].text
  stop = whole[at:at + size]
  found = write(stop=['never', stop], stream=stream, **asked)
  choices = [choice for chunk in found for choice in chunk.choices] if stream else found.choices
  assert ''.join(choice.text for choice in choices) == whole[:whole.index(stop)] and choices[-1].finish_reason == 'stop'


def test_fields_without_effect_are_accepted(write):
  assert write(user='me', best_of=1).choices == write().choices


# Conversations


def test_an_answer_has_every_field(talk):
  found = talk(extra_body={'ignore_eos': True})
  choice, = found.choices
  assert found.id.startswith('chatcmpl-') and found.object == 'chat.completion' and choice.finish_reason == 'length'
  assert choice.message.role == 'assistant' and choice.message.content and choice.message.refusal is None
  assert found.usage.completion_tokens == 12


def test_the_content_may_be_in_parts(talk):
  parts = [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hel'}, {'type': 'text', 'text': 'lo'}]}]
  assert talk(parts).choices == talk().choices


def test_earlier_messages_count(talk):
  longer = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}, *HELLO]
  found, alone = (talk(messages, logprobs=True) for messages in (longer, HELLO))
  assert found.usage.prompt_tokens > alone.usage.prompt_tokens
  assert found.choices[0].logprobs.content[0].logprob != alone.choices[0].logprobs.content[0].logprob


def test_the_newer_name_of_the_limit_wins(talk):
  found = talk(max_completion_tokens=3, extra_body={'ignore_eos': True})
  assert found.usage.completion_tokens == 3


def test_several_answers(talk):
  found = talk(n=3).choices
  assert [choice.index for choice in found] == [0, 1, 2] and len({choice.message.content for choice in found}) == 3


def test_log_probabilities_of_an_answer_have_its_bytes(talk):
  found = talk(logprobs=True, top_logprobs=3, temperature=0).choices[0]
  for token in found.logprobs.content:
    assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob
  told = b''.join(bytes(token.bytes) for token in found.logprobs.content)
  assert told.decode(errors='replace').replace('\ufffd', '') == found.message.content.replace('\ufffd', '')


def test_an_answer_stops(talk, bias):
  whole = talk(logit_bias=bias('abcdefgh', 30)).choices[0].message.content
  found = talk(logit_bias=bias('abcdefgh', 30), stop=whole[4]).choices[0]
  assert found.message.content == whole[:whole.index(whole[4])] and found.finish_reason == 'stop'


# Streams


@pytest.mark.parametrize('count', [1, 2])
def test_a_stream_of_a_completion_is_the_text_in_order(write, count):
  chunks = [*write(stream=True, n=count)]
  for choice in write(n=count).choices:
    mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
    assert ''.join(one.text for one in mine) == choice.text
    assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
  assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {'text_completion'}


@pytest.mark.parametrize('count', [1, 2])
def test_a_stream_of_an_answer_begins_with_its_role(talk, count):
  chunks = [*talk(stream=True, n=count)]
  for choice in talk(n=count).choices:
    mine = [one for chunk in chunks for one in chunk.choices if one.index == choice.index]
    assert [one.delta.role for one in mine] == ['assistant'] + [None] * (len(mine) - 1)
    assert ''.join(one.delta.content or '' for one in mine) == choice.message.content
    assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]


@pytest.mark.parametrize('kind', ['write', 'talk'])
def test_a_stream_ends_with_its_usage_if_asked(request, kind):
  ask = request.getfixturevalue(kind)
  *chunks, last = ask(stream=True, stream_options={'include_usage': True})
  assert last.choices == [] and last.usage == ask().usage and all(chunk.usage is None for chunk in chunks)


def test_a_stream_has_the_log_probabilities_of_the_whole(talk):
  streamed = [token for chunk in talk(stream=True, logprobs=True, top_logprobs=1) for one in chunk.choices if one.logprobs
              for token in one.logprobs.content]
  assert streamed == talk(logprobs=True, top_logprobs=1).choices[0].logprobs.content


def test_the_clients_own_accumulation_is_the_answer(client, talk, bias):
  asked = {'stop': 'X', 'logit_bias': bias('X', 93) | bias('abcdef', 92)}  # a text that ends by its length is an error there
  with client.chat.completions.stream(messages=HELLO, **ASKED | asked) as stream:
    parts = [event.delta for event in stream if event.type == 'content.delta']
    answer = stream.get_final_completion().choices[0]
  assert ''.join(parts) == answer.message.content == talk(**asked).choices[0].message.content and answer.finish_reason == 'stop'


@pytest.mark.parametrize('character', ['é', '€', '😀'])
def test_characters_whose_bytes_are_tokens_arrive_whole(write, bias, character):
  # The bytes of the character come at random: some make a character, maybe another one, and others none.
  asked = {'logit_bias': bias(character), 'max_tokens': 60, 'logprobs': 0}
  found = write(**asked).choices[0]
  parts = [one.text for chunk in write(stream=True, **asked) for one in chunk.choices]
  assert ''.join(parts) == found.text and len(parts) > 5
  assert any(len(one.encode()) == len(character.encode()) and one != '\ufffd' for one in found.text) and '\ufffd' in found.text


def test_a_prompt_may_end_inside_a_character(server, write):
  first, second = server.tokenizer.encode('é').tolist()
  asked = {'prompt': [first], 'logit_bias': {str(second): 100}, 'max_tokens': 1}
  found = write(**asked).choices[0].text
  assert found == ''.join(one.text for chunk in write(stream=True, **asked) for one in chunk.choices)


def test_a_stream_that_is_closed_frees_its_slot(server, client):
  before = server.scheduler.counts['cancelled']
  with client.completions.create(prompt='a', stream=True, **LONG) as stream:
    next(iter(stream))
  wait(lambda: not server.scheduler.running and server.scheduler.counts['cancelled'] > before)


def test_a_client_whose_time_is_over_frees_its_slot(server, client):
  before = server.scheduler.counts['cancelled']
  with pytest.raises(openai.APITimeoutError):
    client.with_options(timeout=0.02).completions.create(prompt='a', n=20, **LONG)
  wait(lambda: not (server.scheduler.running or server.scheduler.waiting) and server.scheduler.counts['cancelled'] > before)


def test_many_clients_get_what_each_gets_alone(server, client):
  prompts = [''.join(word) for word in itertools.islice(itertools.product('abc', repeat=3), 20)]
  alone = [client.completions.create(prompt=prompt, **ASKED).choices[0].text for prompt in prompts]

  async def together():
    async with openai.AsyncOpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0) as many:
      found = await asyncio.gather(*(many.completions.create(prompt=prompt, **ASKED) for prompt in prompts))
      return [one.choices[0].text for one in found]
  assert asyncio.run(together()) == alone


# Errors


@pytest.mark.parametrize('kind, fields, param, words', [
  ('write', {'temperature': 3}, 'temperature', '0 to 2'), ('write', {'max_tokens': CONTEXT}, 'max_tokens', 'context of 96'),
  ('write', {'prompt': 'a' * CONTEXT}, 'prompt', 'context 96'), ('write', {'logprobs': 30}, 'logprobs', 'at most 20'),
  ('write', {'stop': list('abcde')}, 'stop', 'at most 4'), ('write', {'extra_body': {'beam': 2}}, 'beam', 'unknown field'),
  ('talk', {'tools': [{'type': 'function', 'function': {'name': 'f'}}]}, 'tools', 'not supported'),
  ('talk', {'response_format': {'type': 'json_object'}}, 'response_format', 'not supported'),
  ('talk', {'messages': []}, 'messages', 'one or more'), ('talk', {'top_logprobs': 3}, 'top_logprobs', 'needs logprobs')])
def test_a_mistake_names_its_field(request, kind, fields, param, words):
  with pytest.raises(openai.BadRequestError, match=words) as caught:
    request.getfixturevalue(kind)(**fields)
  assert caught.value.param == param and caught.value.type == 'invalid_request_error'


def test_another_model_is_not_found(write):
  with pytest.raises(openai.NotFoundError, match='there is tiny'):
    write(model='gpt-5')


def test_a_route_that_is_not_there_is_not_found(client):
  with pytest.raises(openai.NotFoundError):
    client.embeddings.create(model='tiny', input='a')


@pytest.fixture(scope='module')
def guarded(parts, server):
  """Another server, with a key and no place to wait, over the same engine; while it is used, the first has nothing to do."""
  wait(lambda: not server.scheduler.running)
  other = Server(*parts, waiting=1, key='secret')
  yield other
  other.close()


def test_a_wrong_key_is_refused(guarded):
  with openai.OpenAI(base_url=f'{guarded.url}/v1', api_key='wrong', max_retries=0) as client:
    with pytest.raises(openai.AuthenticationError) as caught:
      client.models.list()
  assert caught.value.code == 'invalid_api_key'


def test_a_full_queue_is_a_rate_limit_after_which_the_client_tries_again(guarded):
  with openai.OpenAI(base_url=f'{guarded.url}/v1', api_key='secret', max_retries=0) as client:
    with pytest.raises(openai.RateLimitError) as caught:
      client.completions.create(prompt='a', n=2, **ASKED)
    assert caught.value.response.headers['retry-after'] == '1' and caught.value.type == 'rate_limit_error'
    assert client.completions.create(prompt='a', **ASKED).choices[0].text


def test_a_server_that_is_not_ready_says_so(guarded):
  with openai.OpenAI(base_url=f'{guarded.url}/v1', api_key='secret', max_retries=0) as client:
    guarded.api.ready.clear()
    try:
      with pytest.raises(openai.InternalServerError, match='compiled') as caught:
        client.completions.create(prompt='a', **ASKED)
      assert caught.value.status_code == 503
    finally:
      guarded.api.ready.set()
