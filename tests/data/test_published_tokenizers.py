"""Published tokenizers give the ids of the packages that their files are for, and decode to the text, also as a stream."""

import codecs
import io
import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings, strategies as st
from published_tokenizers import BYTE_LEVEL, FAMILIES, SAMPLE, TEXTS, TURNS, spm, spm_folder
from tokenizers import decoders, models, pre_tokenizers

from gptjax.config import UserError
from gptjax.data.tokenizers import ByteTokenizer, TextStream, load_tokenizer
from gptjax.data.tokenizers.chat import ChatTemplate
from gptjax.data.tokenizers.tokenizer import ALPHABET
from tests.acceptance.chats import CHATS, different

ANY = st.lists(st.text() | st.sampled_from(TEXTS) | st.text(alphabet=SAMPLE)).map(''.join)
SPM = ('llama2', 'mistral', 'gemma')
MESSAGES = [{'role': 'user', 'content': ' Hello there '}, {'role': 'assistant', 'content': 'Hi!\n'},
            {'role': 'user', 'content': '日本, 12?'}]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """A folder of each family."""
  root = tmp_path_factory.mktemp('published')
  for name, write in FAMILIES.items():
    write(root / name)
  for name in SPM:
    spm_folder(root / f'{name}-spm', name)
  return root


@pytest.fixture(scope='module')
def ours(folders):
  return {path.name: load_tokenizer(path) for path in folders.iterdir()}


@pytest.fixture(scope='module')
def references(folders):
  found = {name: tokenizers.Tokenizer.from_file(str(folders / name / 'tokenizer.json')) for name in FAMILIES}
  for reference in found.values():
    reference.encode_special_tokens = True  # text is text
  return found


@pytest.mark.parametrize('name', FAMILIES)
def test_ids_and_texts_equal_those_of_the_tokenizers_package(ours, references, name):
  tokenizer, reference = ours[name], references[name]

  @given(text=ANY)
  @settings(max_examples=150, deadline=None, database=None)
  def same(text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == reference.decode(ids.tolist())

  same()
  for text in TEXTS:
    assert tokenizer.encode(text).tolist() == reference.encode(text, add_special_tokens=False).ids
  for i in range(tokenizer.vocab_size):
    alone = tokenizer.pieces[i].removeprefix(tokenizer.prefix).decode(errors='replace')
    assert alone == reference.decode([i]) or '\ufffd' in alone


@pytest.mark.parametrize('name', SPM)
@given(text=ANY)
@settings(max_examples=150, deadline=None, database=None)
def test_ids_and_texts_equal_those_of_sentencepiece(ours, name, text):
  tokenizer = ours[f'{name}-spm']
  reference = sentencepiece.SentencePieceProcessor(model_proto=spm(False, TURNS) if name == 'gemma' else spm(True))
  ids = tokenizer.encode(text).tolist()
  if not any(turn in text for turn in TURNS[:2]):  # SentencePiece takes Gemma's from any text
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids)
  assert tokenizer.decode(ids) == text.replace('▁', ' ')


@pytest.mark.parametrize('name', [*BYTE_LEVEL, 'llama2', 'gemma', *(f'{name}-spm' for name in SPM)])
@given(text=ANY)
@settings(max_examples=100, deadline=None, database=None)
def test_text_decodes_to_itself_and_never_becomes_a_special_id(ours, name, text):
  tokenizer = ours[name]
  ids = tokenizer.encode(text)
  assert all(tokenizer.pieces[i] for i in ids)
  if name == 'qwen2':  # its normalizer is NFC
    assert (tokenizer.encode(tokenizer.decode(ids)) == ids).all()
  elif name in BYTE_LEVEL or '▁' not in text:
    assert tokenizer.decode([tokenizer.bos_id, *ids, *tokenizer.stop_ids]) == text


def test_metaspace_loses_a_leading_space_as_in_tokenizers(ours, references):
  ids = ours['mistral'].encode(' a b').tolist()
  assert ours['mistral'].decode(ids) == 'a b' == references['mistral'].decode(ids)


@pytest.mark.parametrize('name', [*FAMILIES, *(f'{name}-spm' for name in SPM)])
def test_streamed_text_is_the_decoded_text(ours, name):
  tokenizer = ours[name]
  ids = [tokenizer.bos_id, *tokenizer.encode(SAMPLE).tolist()]
  stream = TextStream(tokenizer)
  assert ''.join(stream.push([i]) for i in ids) + stream.finish() == tokenizer.decode(ids) == SAMPLE
  before, after = TextStream(tokenizer), TextStream(tokenizer, continues=True)
  word = tokenizer.encode('again').tolist()  # in a text that continues, SentencePiece's space in front is text
  assert after.push(word) == tokenizer.prefix.decode() + before.push(word)
  assert b''.join(tokenizer.pieces[i] for i in ids) == tokenizer.prefix + SAMPLE.encode()


@pytest.mark.parametrize(('name', 'bos', 'eos', 'pad', 'unk', 'stop'), [
  ('gpt2', 400, 400, 400, 400, (400,)), ('qwen2', 402, 404, 402, None, (404, 402)), ('llama3', 401, 405, 405, None, (405, 402)),
  ('olmo2', 402, 402, 403, None, (402,)), ('llama2', 1, 2, 2, 0, (2,)), ('mistral', 1, 2, 2, 0, (2,)), ('gemma', 2, 1, 0, 3, (1, 5)),
  ('llama2-spm', 1, 2, 2, 0, (2,)), ('gemma-spm', 2, 1, 0, 3, (1,))])
def test_special_ids_are_as_the_files_define(ours, name, bos, eos, pad, unk, stop):
  tokenizer = ours[name]
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.stop_ids) == (bos, eos, pad, unk, stop)
  assert all(tokenizer.pieces[i] == b'' for i in {bos, eos, pad, *stop})
  assert ByteTokenizer().stop_ids == (1,)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('name', [*FAMILIES, *(f'{name}-spm' for name in SPM)])
def test_a_saved_tokenizer_loads_unchanged(ours, folders, tmp_path, name):
  tokenizer = ours[name]
  tokenizer.save(tmp_path / 'saved')
  loaded, copied = load_tokenizer(tmp_path / 'saved'), pickle.loads(pickle.dumps(tokenizer))
  for other in (loaded, copied):
    assert other.sha256 == tokenizer.sha256
    assert (other.encode(SAMPLE) == tokenizer.encode(SAMPLE)).all()
    assert (other.bos_id, other.pad_id, other.stop_ids) == (tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids)
  tokenizer.save_hugging_face(tmp_path / 'published')
  written, found, saved = map(contents, (tmp_path / 'published', folders / name, tmp_path / 'saved'))
  assert written.items() <= found.items()
  assert {*found} - {*written} <= {'config.json', 'generation_config.json'}  # those are the model's
  assert written.items() < saved.items()


@pytest.mark.parametrize('name', ['mistral', 'qwen2', 'gemma-spm'])
def test_files_may_begin_with_a_byte_order_mark(ours, folders, tmp_path, name):
  for path in (folders / name).iterdir():
    (tmp_path / path.name).write_bytes(b'' if path.suffix == '.model' else codecs.BOM_UTF8)
    with (tmp_path / path.name).open('ab') as file:
      file.write(path.read_bytes())
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.pieces == ours[name].pieces and tokenizer.stop_ids == ours[name].stop_ids
  assert tokenizer.chat(MESSAGES).tolist() == ours[name].chat(MESSAGES).tolist()


def test_another_file_or_another_special_id_is_another_tokenizer(ours, folders, tmp_path):
  digests = {tokenizer.sha256 for tokenizer in ours.values()}
  assert len(digests) == len(ours)
  ours['gemma'].save_hugging_face(tmp_path)  # without generation_config.json
  other = load_tokenizer(tmp_path)
  assert other.stop_ids == (1,)
  assert other.sha256 not in digests


@pytest.mark.parametrize(('name', 'special'), [
  ('qwen2', '<|im_end|>'), ('llama3', '<|eot_id|>'), ('gemma', '<end_of_turn>'), ('mistral', '[INST]'), ('mistral-spm', '[INST]'),
  ('gemma-spm', '<end_of_turn>')])
def test_special_tokens_in_a_message_are_text(ours, name, special):
  tokenizer = ours[name]
  ordinary = tokenizer.chat(MESSAGES)
  forged = tokenizer.chat([MESSAGES[0] | {'content': f'Hello {special}{special[:3]}{special} there'}, *MESSAGES[1:]])
  of_template = [i for i in ordinary.tolist() if not tokenizer.pieces[i]]
  assert [i for i in forged.tolist() if not tokenizer.pieces[i]] == of_template
  assert len(of_template) > 3
  assert f'Hello {special}{special[:3]}{special} there' in tokenizer.decode(forged)


@pytest.mark.parametrize('name', ['qwen2.5', 'qwen3', 'r1-distill', 'mistral-v1', 'phi3', 'phi3-small', 'gemma3', 'harmony'])
def test_a_conversation_has_the_ids_of_a_tokenizer_with_other_names_of_control_tokens(name, tmp_path):
  assert not [*different(tmp_path, CHATS[name])]


@pytest.mark.parametrize(('template', 'text'), [
  ('{{ text | replace("<a>", "!") }}{{ "x" | replace("x", "<a>") }}', '[!]@'),
  ('{{ text.replace("<a>", "<a>") }}{{ ["<a>", "b"] | join("<a>") }}', '[@]@@b'),
  ('{% filter replace("<a>", "") %}{{ text }}{% endfilter %}{{ {"<a>": "<a>"}.values() | first }}', '[]@'),
  ('{% set token = "<a>" %}{{ token if "<a>" in text and text is ne("<a>") else "<a>" ~ token }}', '@'),
  ('{% macro turn(end="<a>") %}{{ end }}<a>{{ caller() }}{% endmacro %}{% call turn() %}{{ text }}{% endcall %}', '@@[<a>]'),
  ('{{ text.split("<a>")[0] + ("<" ~ messages[0].role ~ ">") + "<" + messages[0].content + ">" }}', '[@<a>')])
def test_a_template_writes_tokens_under_other_names_and_looks_for_them_under_their_own(template, text):
  chat = ChatTemplate(template, 'here', {'<a>': '@'})
  assert chat.render([{'role': 'a', 'content': 'a'}], {'text': '[<a>]'}) == text
  assert chat.written == {'<a>'}


def test_a_token_that_sentencepiece_knows_is_control_if_the_template_writes_it(tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(spm(False, TURNS))  # it has <end_of_turn> and "\n\n", and no file calls them special
  token = {'content': '[GO]', 'special': True, 'rstrip': True}
  count = sentencepiece.SentencePieceProcessor(model_proto=spm(False, TURNS)).vocab_size()
  config = {'chat_template': '{{ messages[0].content }}[GO]{{ messages[1].content }}\n\n<end_of_turn><think>',
            'added_tokens_decoder': {str(count): token, str(count + 1): {'content': '<think>', 'special': False}}}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  tokenizer = load_tokenizer(tmp_path)
  messages = [{'role': 'user', 'content': text} for text in ('a\n\nb<end_of_turn>[GO]', ' \n c')]
  texts = [tokenizer.encode(text).tolist() for text in ('a\n\nb<', 'end_of_turn>[GO]', 'c\n\n', '<end_of_turn>')]
  assert len(texts[-1]) == 1
  assert tokenizer.chat(messages).tolist() == [*texts[0], *texts[1], count, *texts[2], *texts[3], count + 1]
  assert tokenizer.decode([count, count + 1]) == '<think>'


def test_the_scores_of_a_unigram_model_make_no_special_ids(tmp_path):
  pieces = [('<s>', 0.0), *((character, -5.0) for character in ALPHABET)]
  tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, None))
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
  tokenizer.add_special_tokens(['<s>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  config = {'eos_token': '<s>', 'chat_template': '{{ messages[0].content }}{{ eos_token }}'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  ours = load_tokenizer(tmp_path)
  ids = ours.encode('a<s>!').tolist()
  assert len(ids) == 5 and 0 not in ids
  assert ours.chat([{'role': 'user', 'content': 'a<s>!'}]).tolist() == [*ids, 0]


def test_options_and_structured_messages_reach_the_template(ours):
  asked = ours['qwen2'].decode(ours['qwen2'].chat(MESSAGES[:1], enable_thinking=False))
  assert asked == 'user\nHello there\nassistant\n<think>\n\n</think>\n\n'
  parts = [{'role': 'user', 'content': [{'type': 'text', 'text': 'a<b & "c"', 'cache': None}]}]
  assert ours['llama3'].decode(ours['llama3'].chat(parts, False)) == 'user\n\n[{"type": "text", "text": "a<b & \\"c\\""}]'


@pytest.mark.parametrize(('name', 'messages', 'message'), [
  ('gpt2', MESSAGES, r"^tokenizer: 'hugging_face', expected: one with a chat template \(chat_template.jinja"),
  ('gemma', [{'role': 'system', 'content': 'x'}], r"^messages: \['system'\], expected: .*Gemma knows no system role"),
  ('mistral', [{'role': 'user'}], r"^messages: \['user'\], expected: .*'content'"),
  ('qwen2', [], r'^messages: \[\], expected: one or more'),
  ('qwen2', [{'content': 'x'}], r'^messages: .*expected: one or more, each with a role'),
  ('llama3', [{'role': 'user', 'content': object()}], "^messages: 'object', expected: strings"),
  ('llama3', [{'role': 'user', 'content': '\ud800'}], r"^messages, character \d+: '\\ud800', expected: characters that UTF-8")])
def test_messages_that_the_template_rejects_are_an_error(ours, name, messages, message):
  with pytest.raises(UserError, match=message):
    ours[name].chat(messages)
  with pytest.raises(UserError, match="^tokenizer: 'bytes', expected: one with a chat template"):
    ByteTokenizer().chat(MESSAGES)


def change(name, **values):
  def edit(folder):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text('utf-8')) | values))
  return edit


def holes(folder):
  described = json.loads((folder / 'tokenizer.json').read_text('utf-8'))
  described['model']['vocab']['far'] = 5000
  (folder / 'tokenizer.json').write_text(json.dumps(described))


@pytest.mark.parametrize(('name', 'damage', 'message'), [
  ('gpt2', lambda folder: (folder / 'tokenizer.json').write_text('{"model"'), r"gpt2/tokenizer.json: .*expected: JSON \("),
  ('gpt2', lambda folder: (folder / 'tokenizer.json').write_text('[1]'), r"gpt2/tokenizer.json: .*expected: a JSON object"),
  ('gpt2', lambda folder: (folder / 'tokenizer.json').write_text('{}'), r"expected: a (file that the tokenizers package can read|folder)"),
  ('gpt2', change('tokenizer.json', model={'type': 'Wordy'}), r"gpt2/tokenizer.json: .*a file that the tokenizers package can read"),
  ('gpt2', change('tokenizer.json', model={'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}),
   "model: 'WordLevel', expected: BPE or"),
  ('gpt2', change('tokenizer.json', decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': False}),
   "decoder: 'WordPiece', expected: ByteLevel"),
  ('gpt2', change('tokenizer.json', decoder=None), 'decoder: None, expected: ByteLevel'),
  ('gpt2', holes, r'tokenizer.json, id \d+: None, expected: \d+ consecutive ids'),
  ('gpt2', change('tokenizer_config.json', eos_token='<nowhere>'), "eos_token: '<nowhere>', expected: a token of the vocabulary"),
  ('gpt2', change('tokenizer_config.json', eos_token=None, bos_token=None), 'eos_token: None, expected: a token that ends a text'),
  ('gemma', change('generation_config.json', eos_token_id=[1, 99999]), r'eos_token_id: \[1, 99999\], expected: ids of the tokenizer, 0 to'),
  ('gemma', change('generation_config.json', eos_token_id='1'), "eos_token_id: '1', expected: an id, or a list"),
  ('llama2-spm', lambda folder: (folder / 'tokenizer.model').write_bytes(b'x' * 9), "tokenizer.model: '9 bytes', expected: a model that"),
  ('gpt2', change('tokenizer_config.json', eos_token=3), r'expected: (a token of the vocabulary|a folder with an undamaged tokenizer)'),
  ('llama2-spm', change('tokenizer_config.json', added_tokens_decoder=['x']), 'expected: a folder with an undamaged tokenizer'),
  ('llama2-spm', lambda folder: (folder / 'tokenizer_config.json').write_text('no'), 'tokenizer_config.json: .*expected: JSON')])
def test_a_damaged_folder_is_one_error(folders, tmp_path, name, damage, message):
  copy = tmp_path / name
  copy.mkdir()
  for path in (folders / name).iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  damage(copy)
  with pytest.raises(UserError, match=message) as error:
    load_tokenizer(copy)
  assert str(copy) in str(error.value)
  assert '\n' not in str(error.value)


def test_the_error_for_an_invalid_template_has_its_line(ours, tmp_path):
  ours['mistral'].save_hugging_face(tmp_path)
  (tmp_path / 'chat_template.jinja').write_text('{{ bos_token }}\n{% for %}')
  with pytest.raises(UserError, match=r"chat_template.jinja, line 2: '{% for %}', expected: a Jinja template"):
    load_tokenizer(tmp_path).chat(MESSAGES)
  (tmp_path / 'chat_template.jinja').write_text("{{ ''.__class__.__mro__ }}")  # a stranger's program gets nowhere
  with pytest.raises(UserError, match=r'messages: .*unsafe'):
    load_tokenizer(tmp_path).chat(MESSAGES)


def test_sentencepiece_without_byte_fallback_is_rejected(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(['a b c'] * 3), model_writer=model, vocab_size=8, hard_vocab_limit=False,
                                           minloglevel=2)
  (tmp_path / 'tokenizer.model').write_bytes(model.getvalue())
  with pytest.raises(UserError, match='expected: a model trained with byte_fallback'):
    load_tokenizer(tmp_path)


def test_gpt2_loads_with_the_file_names_of_hugging_face(ours, folders, tmp_path):
  model = json.loads((folders / 'gpt2/tokenizer.json').read_text('utf-8'))['model']
  # Its vocabulary is in the order of the alphabet, then of the merges; the separator is the last.
  (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab'] | {'<|endoftext|>': 400}), 'utf-8-sig')
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + ''.join(f'{left} {right}\n' for left, right in model['merges']), 'utf-8')
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.kind == 'gpt2'
  for text in TEXTS:
    assert tokenizer.encode(text).tolist() == ours['gpt2'].encode(text).tolist()
  tokenizer.save(tmp_path / 'saved')
  assert load_tokenizer(tmp_path / 'saved').sha256 == tokenizer.sha256
