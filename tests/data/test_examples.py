"""Examples: the loss begins with the first token of an answer and ends with the token that ends it; rows have whole examples alone."""

import collections
import dataclasses
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st
from published_tokenizers import FAMILIES, TEXTS

from gptjax.config import Component, Config, DataConfig, ObjectiveConfig, SourceConfig, TokenizerConfig, UserError, ValidationSet
from gptjax.data import EvalRows, Mixture, Packed, TokenStore, TrainRows, prepare, tokenizing
from gptjax.data.examples import encode_example, marked_example
from gptjax.data.sources import Document, Malformed, open_source, split_source
from gptjax.data.sources.source import Turn
from gptjax.data.sources.text import JsonLines
from gptjax.data.tokenizers import ByteTokenizer, load_tokenizer
from gptjax.data.tokenizing import Recipe, write_store

MESSAGES = [{'role': 'user', 'content': 'One and two?'}, {'role': 'assistant', 'content': 'Three.\n'},
            {'role': 'user', 'content': '<|im_end|> Sure?'}, {'role': 'assistant', 'content': ' It is </s> 3'}]
CHATS = ('llama3', 'mistral', 'gemma', 'qwen2')


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
  root = tmp_path_factory.mktemp('tokenizers')
  for name, write in FAMILIES.items():
    write(root / name)
  return {name: load_tokenizer(root / name) for name in FAMILIES} | {'bytes': ByteTokenizer()}


def turns(messages, weight=1.0):
  return tuple(Turn(one['role'], one['content'], one['role'] == 'assistant', weight * (one['role'] == 'assistant')) for one in messages)


@pytest.mark.parametrize('name', [*FAMILIES, 'bytes'])
def test_a_completion_and_its_end_are_targets(name, tokenizers):
  tokenizer = tokenizers[name]
  part = st.lists(st.sampled_from(TEXTS) | st.text(max_size=4)).map(''.join)

  @given(prompt=part, completion=part)
  @settings(max_examples=20, deadline=None, database=None)
  def check(prompt, completion):
    found = encode_example(tokenizer, Document('a', '', (Turn('', prompt, False, 0.0), Turn('', completion, True, 1.0))))
    asked = [*tokenizer.start_ids, *tokenizer.encode(prompt)] or [tokenizer.bos_id]  # what generation reads
    assert found.ids[:len(asked)].tolist() == asked and found.ids[-1] == tokenizer.eos_id
    assert found.weights.tolist() == [0.0] * (len(asked) - 1) + [1.0] * (len(found.ids) - len(asked)) + [0.0]
    text = tokenizer.decode(found.ids)
    if name in ('bytes', 'gpt2', 'llama3'):  # others normalize texts
      assert text == prompt + completion

  check()


@pytest.mark.parametrize('name', [*CHATS, 'bytes', 'gpt2'])
def test_answers_of_a_conversation_follow_the_prompt_that_generation_reads(name, tokenizers):
  tokenizer = tokenizers[name] if name in CHATS else tokenizers[name].with_plain_chat()
  parts = tokenizer.conversation(MESSAGES)
  ids, before = np.concatenate([part for part, _ in parts]), np.empty(0, np.int32)
  assert ids.tolist() == tokenizer.chat(MESSAGES, add_generation_prompt=False).tolist()
  for part, number in parts:
    if number is not None:
      assert before.tolist() == tokenizer.chat(MESSAGES[:number]).tolist()
      assert part[-1] in tokenizer.stop_ids and not {*part[:-1].tolist()} & {*tokenizer.stop_ids}
      assert MESSAGES[number]['content'].strip() in tokenizer.decode(part)
    before = np.concatenate([before, part])
  assert [number for _, number in parts if number is not None] == [1, 3]
  found = encode_example(tokenizer, Document('a', '', turns(MESSAGES, 0.5)))
  assert found.ids.tolist() == ids.tolist() and found.weights.sum() == 0.5 * sum(len(part) for part, number in parts if number)


def test_plain_conversations_survive_saving_and_pickling(tokenizers, tmp_path):
  for name in ('bytes', 'gpt2', 'llama3', 'llama2-spm' if 'llama2-spm' in tokenizers else 'llama2'):
    plain = tokenizers[name].with_plain_chat()
    plain.save(tmp_path / name)
    for other in (load_tokenizer(tmp_path / name), pickle.loads(pickle.dumps(plain))):
      assert other.chat(MESSAGES).tolist() == plain.chat(MESSAGES).tolist() and other.sha256 == plain.sha256
    assert not tokenizers[name].plain_chat


def test_a_template_that_is_missing_is_an_error(tokenizers):
  assert tokenizers['llama3'].for_chat('template') is tokenizers['llama3'] and tokenizers['llama3'].for_chat('plain').plain_chat
  again = tokenizers['llama3'].with_plain_chat().for_chat('template')
  assert again.chat(MESSAGES).tolist() == tokenizers['llama3'].chat(MESSAGES).tolist()
  with pytest.raises(UserError, match=r"^data.source.chat: 'template', expected: plain, or in data.tokenizer.path a tokenizer with"):
    tokenizers['bytes'].for_chat('template')


@pytest.mark.parametrize('name', ['llama2', 'mistral'])
def test_a_completion_gets_no_second_space(name, tokenizers):
  turns = Turn('', 'the reader: ', False, 0.0), Turn('', 'the words', True, 1.0)
  assert tokenizers[name].decode(encode_example(tokenizers[name], Document('a', '', turns)).ids) == 'the reader: the words'


CHATML = '{% for m in messages %}<|im_start|>{{ m.role }}\n' '{{ m.content }}<|im_end|>\n' '{% endfor %}'
PROMPT = '{% if add_generation_prompt %}<|im_start|>assistant\n' '{% endif %}'
LAST = '{% if loop.last %}<|im_end|>{% else %}<|im_start|>{% endif %}'
OTHER = "{% if m.role == 'assistant' and not loop.last %}<|im_start|>{% else %}<|im_end|>{% endif %}"  # as gpt-oss


@pytest.mark.parametrize('template, messages, error', [
  (CHATML.replace('<|im_end|>', LAST) + PROMPT, MESSAGES, r"^messages\[1\]: 'Three.', .*writes after its generation prompt"),
  (CHATML.replace('<|im_end|>', '') + PROMPT, MESSAGES, r'^messages\[1\]: .*as it is, and then a token that ends a text: <|im_end|>'),
  (CHATML.replace('<|im_end|>', OTHER) + PROMPT, MESSAGES, r"^messages\[1\]: 'Three.', .*and then a token that ends a text"),
  (CHATML.replace('m.content', "m.content.split('*')[-1]") + PROMPT, [MESSAGES[0], {'role': 'assistant', 'content': 'thought*said'}],
   r"^messages\[1\]: 'thought\*said', .*as it is"),
  (CHATML + PROMPT, MESSAGES[1:], r"^messages\[0\]: 'Three.', .*after a first message")])
def test_an_answer_that_generation_would_not_give_so_is_an_error(template, messages, error, tmp_path):
  FAMILIES['qwen2'](tmp_path)
  for path in tmp_path.glob('chat_template.jinja'):
    path.unlink()
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | {'chat_template': template}))
  with pytest.raises(UserError, match=error):
    load_tokenizer(tmp_path).conversation(messages)


def test_examples_do_not_depend_on_the_day(tmp_path):
  FAMILIES['qwen2'](tmp_path)
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  dated = {'chat_template': "{{ strftime_now('%d %b %Y') }}" + CHATML + PROMPT}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | dated))
  (tmp_path / 'chat_template.jinja').unlink(missing_ok=True)
  ids = np.concatenate([part for part, _ in load_tokenizer(tmp_path).conversation(MESSAGES)])
  assert load_tokenizer(tmp_path).decode(ids).startswith('26 Jul 2024')


def test_rejected_conversations_are_malformed_records(tmp_path):
  records = [{'m': MESSAGES}, {'m': [MESSAGES[0], MESSAGES[0], MESSAGES[1]]}, {'m': MESSAGES}, {'m': [MESSAGES[1]]}]
  config = SourceConfig(str(write(tmp_path, records, 'jsonl')), messages='m', chat='plain')
  recipe = lambda **values: Recipe(open_source(dataclasses.replace(config, **values)), ByteTokenizer().with_plain_chat())
  with pytest.raises(UserError, match=r'records.jsonl:2: .*user.*user.*expected: user and assistant in turn'):
    write_store(tmp_path / 'store', recipe())
  store = write_store(tmp_path / 'store', recipe(skip=0.5))
  assert store.documents == 2 and store.manifest['malformed'] == 2


def test_documents_and_examples_may_share_a_batch(store, tmp_path):
  (tmp_path / 'text.txt').write_text('one\n' 'two\n' 'three')
  source = open_source(SourceConfig(str(tmp_path / 'text.txt'), separator='\\n'))
  documents = write_store(tmp_path / 'documents', Recipe(source, ByteTokenizer()))
  layouts = [Packed(one, 32, 'pack', tmp_path) for one in (documents, store)]
  rows = TrainRows(layouts, Mixture([layout.count for layout in layouts], [1.0, 1.0]), 32, 0, True)
  batch = rows.batch(np.arange(2 * layouts[1].count))
  found = examples_of(batch)
  texts = [(ByteTokenizer().decode(tokens), ByteTokenizer().decode(targets)) for tokens, targets in found]
  assert {('one', 'one'), ('two', 'two'), ('three', 'three'), ('0?\n' '0!', '0!'), ('long 1?\n' '1!', '1!')} <= {*texts}


def test_the_weight_of_a_message_is_that_of_its_targets(tmp_path):
  half = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'bcd', 'weight': 0.5}]
  source = open_source(SourceConfig(str(write(tmp_path, [{'m': half}] * 3, 'jsonl')), **KINDS['messages']))
  store = write_store(tmp_path / 'store', Recipe(source, ByteTokenizer().with_plain_chat()))
  assert (store.targets, store.target_bytes) == (3 * 0.5 * 4, 3 * 0.5 * (3))
  batch = EvalRows(store, 64, False, tmp_path).batch(np.arange(3))
  assert {*batch['mask'].reshape(-1).tolist()} == {0.0, 0.5} and batch['mask'].sum() == store.targets and 'segments' in batch


@pytest.mark.parametrize('roles', [['assistant', 'user'], ['user', 'user'], ['user', 'system', 'assistant'], ['tool'], []])
def test_plain_conversations_have_roles_in_order(roles, tokenizers):
  with pytest.raises(UserError, match=r'^messages: \[.*user and assistant in turn'):
    tokenizers['bytes'].with_plain_chat().conversation([{'role': role, 'content': 'a'} for role in roles])


@pytest.mark.parametrize('message', ['text', {'role': 'user'}, {'role': 'user', 'content': None}, {'content': 'a'}])
def test_messages_that_are_none_are_named(message, tokenizers):
  with pytest.raises(UserError, match=r'^messages: \[.*a role and a content'):
    tokenizers['bytes'].with_plain_chat().chat([message])


EXAMPLES = [{'q': f'{"long " * (i % 4)}{i}?', 'a': f'{i}!',
             'm': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': f'{i}!'}]} for i in range(40)]
KINDS = {'completion': {'prompt': '{q}\\n', 'completion': 'a'}, 'messages': {'messages': 'm', 'chat': 'plain'},
         'chat': {'prompt': 'q', 'completion': 'a', 'chat': 'plain'}}


def write(folder, records, ending):
  path = folder / f'records.{ending}'
  if ending == 'parquet':
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
  else:
    path.write_text('\n'.join(map(json.dumps, records)))
  return path


@pytest.mark.parametrize('ending', ['jsonl', 'parquet'])
@pytest.mark.parametrize('kind', KINDS)
def test_records_become_examples(kind, ending, tmp_path):
  source = open_source(SourceConfig(str(write(tmp_path, EXAMPLES, ending)), **KINDS[kind]))
  found = list(source)
  assert source.has_examples and len({one.name for one in found}) == len(EXAMPLES)
  for record, one in zip(EXAMPLES, found, strict=True):
    assert [turn.content for turn in one.turns] == (
      [one['content'] for one in record['m']] if kind == 'messages' else [record['q'] + '\n' * (kind == 'completion'), record['a']])
    assert [(turn.is_answer, turn.weight) for turn in one.turns] == [(False, 0.0), (True, 1.0)]
  both = open_source(SourceConfig(str(tmp_path / f'records.{ending}'), supervised='all', **KINDS[kind]))
  assert {turn.weight for one in both for turn in one.turns} == {1.0} and both.fingerprint() != source.fingerprint()


@pytest.mark.parametrize('record, words', [
  ({'q': 'a', 'a': ' '}, 'answers'), ({'q': 'a'}, 'a field that the record has'), ({'q': 'a', 'a': [1]}, 'text'),
  ({'m': []}, 'a list of messages'), ({'m': 'text'}, 'a list of messages'), ({'m': [{'role': 'user'}]}, 'role and content'),
  ({'m': [{'role': 'user', 'content': 'a'}]}, 'answers'), ({'m': [{'role': 'assistant', 'content': ''}]}, 'answers'),
  ({'m': [{'role': 'assistant', 'content': 'a', 'weight': 2}]}, 'a weight from 0 to 1'),
  ({'m': {'role': 'user', 'content': 'a'}}, 'list'),
  ({'m': [{'role': 'user', 'content': 'a', 'weight': 1}]}, 'of other roles'), ({'m': [{'role': '', 'content': 'a'}]}, 'role and content'),
  ({'m': {'role': ['user'], 'content': []}}, 'list'),
  ({'m': [{'role': 'assistant', 'content': 'a', 'tool_calls': [1]}]}, 'role, content and weight alone'), ({'m': {'role': 1}}, 'list'),
  ({'m': [{'role': 'assistant', 'content': '\ud800'}]}, 'role and content')])
def test_records_without_an_example_are_malformed(record, words, tmp_path):
  kind = KINDS['messages' if 'm' in record else 'completion']
  found, = open_source(SourceConfig(str(write(tmp_path, [record], 'jsonl')), **kind))
  assert isinstance(found, Malformed) and words in found.expected


def test_weights_of_messages_and_lists_per_key(tmp_path):
  messages = {'role': ['user', 'assistant', 'user', 'assistant'], 'content': list('abcd'), 'weight': [None, 0, 0.0, 0.25],
              'name': [''] * 4}
  found, = open_source(SourceConfig(str(write(tmp_path, [{'m': messages}], 'jsonl')), **KINDS['messages']))
  assert [turn.weight for turn in found.turns] == [0.0, 0.0, 0.0, 0.25]


@pytest.mark.parametrize('values, field', [
  ({'prompt': 'q'}, 'completion'), ({'completion': 'a'}, 'prompt'), ({'messages': 'm'}, 'chat'), ({'chat': 'plain'}, 'chat'),
  ({'prompt': 'q', 'completion': 'a', 'messages': 'm'}, 'messages'), ({'supervised': 'all'}, 'supervised'),
  ({'prompt': 'q', 'completion': 'a', 'text': 'b'}, 'text')])
def test_fields_that_do_not_go_together(values, field):
  with pytest.raises(UserError, match=f'^data.source.{field}: '):
    SourceConfig(**values)


@pytest.mark.parametrize('values, field', [
  ({'prompt': 'x', 'completion': 'a'}, 'prompt'), ({'messages': 'x', 'chat': 'plain'}, 'messages')])
def test_a_column_that_is_missing_is_named(values, field, tmp_path):
  with pytest.raises(UserError, match=f"^data.source.{field}: 'x', expected: a column of"):
    list(open_source(SourceConfig(str(write(tmp_path, EXAMPLES, 'parquet')), **values)))


@pytest.fixture
def store(tmp_path, monkeypatch) -> TokenStore:
  monkeypatch.setattr(JsonLines, 'part_bytes', 500)
  monkeypatch.setattr(tokenizing, 'TASK', 1)  # a task a part
  source = open_source(SourceConfig(str(write(tmp_path, EXAMPLES, 'jsonl')), **KINDS['completion']))
  return write_store(tmp_path / 'store', Recipe(source, ByteTokenizer(), shard_tokens=200))


def examples_of(batch):
  """Each example in a batch: its tokens, and its targets with their weights; also whether positions begin at 0."""
  found = collections.Counter()
  for tokens, targets, mask, segments, positions in zip(*(batch[name] for name in ('tokens', 'targets', 'mask', 'segments', 'positions'))):
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      assert positions[here].tolist() == list(range(here.sum()))
      found[tuple(tokens[here].tolist()), tuple(targets[here & (mask > 0)].tolist())] += 1
  return found


def test_each_row_has_whole_examples_and_their_targets_once(store, tmp_path):
  tokenizer, starts = ByteTokenizer(), store.starts(0, store.documents)
  assert store.manifest['shards'] > 1 and store.targets == sum(len(one['a']) + 1 for one in EXAMPLES)
  assert store.manifest['examples']['least_targets'] == 3 and store.target_bytes == sum(len(one['a']) for one in EXAMPLES)
  wanted = collections.Counter(
    (tuple(store.read([start], [stop - start]).tolist()), (*tokenizer.encode(record['a']).tolist(), tokenizer.eos_id))
    for record, start, stop in zip(EXAMPLES, starts, starts[1:], strict=False))
  for kind in ('pack', 'document'):
    layout = Packed(store, 32, kind, tmp_path)
    rows = TrainRows([layout], Mixture([layout.count], [1.0]), 32, 0, True)
    assert examples_of(rows.batch(np.arange(layout.count))) == examples_of(rows.batch(layout.count + np.arange(layout.count))) == wanted
  valid = EvalRows(store, 32, True, tmp_path)
  batch = valid.batch(np.arange(valid.count + 2))
  assert examples_of(batch) == wanted and batch['mask'].sum() == store.targets
  assert marked_example(store, tokenizer, 1) == '<1>long 1?\n⟦1!<1>⟧'


@pytest.mark.parametrize('cut', [False, True])
def test_examples_longer_than_the_context_are_dropped_or_cut(cut, store, tmp_path):
  lengths = np.diff(store.starts(0, store.documents))
  firsts = [len(f'x{one["q"]}\n') for one in EXAMPLES]  # tokens before the answer
  context = 13
  kept = [first for first, length in zip(firsts, lengths) if length > context and first <= context]
  assert kept and (lengths > context).sum() > len(kept)
  layout = Packed(store, context, 'pack', tmp_path, cut)
  assert (layout.dropped, layout.cut) == ((lengths > context).sum() - cut * len(kept), cut * len(kept))
  found = examples_of(TrainRows([layout], Mixture([layout.count], [1.0]), context, 0, True).batch(np.arange(layout.count)))
  assert found.total() == len(EXAMPLES) - layout.dropped and all(targets for _, targets in found)
  with pytest.raises(UserError, match='^data.context: 2, expected: more'):
    Packed(store, 2, 'pack', tmp_path, cut)


def test_examples_are_held_out_whole(tmp_path):
  source = open_source(SourceConfig(str(write(tmp_path, EXAMPLES, 'jsonl')), **KINDS['completion']))
  train, valid = ({one.name: one.turns for one in side} for side in split_source(source, 0.2))
  assert not {*train} & {*valid} and train | valid == {one.name: one.turns for one in source} and len(valid) == 8
  assert [len(list(side)) for side in split_source(source, 0.001)] == [39, 1]


@pytest.mark.parametrize('values, field', [({'rows': 'concat'}, 'data.rows'), ({'isolate_documents': False}, 'data.isolate_documents')])
def test_rows_that_examples_cannot_have(values, field, tmp_path):
  source = SourceConfig(str(write(tmp_path, EXAMPLES, 'jsonl')), **KINDS['completion'])
  with pytest.raises(UserError, match=f'^{field}: '):
    DataConfig(source, **({'rows': 'pack'} | values))
  store = write_store(tmp_path / 'store', Recipe(open_source(source), ByteTokenizer()))
  with pytest.raises(UserError, match=f'^{field}: '):
    stores = {'train': (Component(store.location),), 'valid': (ValidationSet('a', store.location),)}
    prepare(DataConfig(**stores, **({'rows': 'pack'} | values)), tmp_path)


def test_a_template_needs_a_tokenizer_that_has_one(tmp_path):
  with pytest.raises(UserError, match='^data.tokenizer.path: '):
    Config(data=DataConfig(SourceConfig('a.jsonl', **(KINDS['chat'] | {'chat': 'template'})), rows='pack'),
           objective=ObjectiveConfig('sft'))


def test_a_mixture_has_the_tokenizer_of_its_examples(tmp_path):
  (tmp_path / 'text.txt').write_text('some text')
  sources = SourceConfig(str(tmp_path / 'text.txt')), SourceConfig(str(write(tmp_path, EXAMPLES, 'jsonl')), **KINDS['chat'])
  stores = [write_store(tmp_path / name, Recipe(open_source(source), ByteTokenizer().for_chat(source.chat))).location
            for name, source in zip(('documents', 'examples'), sources)]
  for order in (stores, stores[::-1]):
    found = prepare(DataConfig(train=tuple(map(Component, order)), valid=(ValidationSet('a', stores[0]),), rows='pack'), tmp_path)
    assert found.tokenizer.plain_chat


def test_the_tokenizer_of_characters_knows_the_headings(tmp_path):
  source = SourceConfig(str(write(tmp_path, EXAMPLES, 'jsonl')), **KINDS['chat'])
  found = prepare(DataConfig(source, tokenizer=TokenizerConfig('chars'), context=64, rows='pack'), tmp_path)
  assert found.tokenizer.plain_chat and found.example.startswith('<1>### User:\n') and '⟦' in found.example
