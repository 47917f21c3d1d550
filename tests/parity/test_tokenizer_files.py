"""Folders of tokenizers opened by transformers, and our own tokenizers as it opens them: the same ids and texts."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tiers import full
from published_tokenizers import FAMILIES, SAMPLE, TEXTS, spm_folder

from gptjax.config import TokenizerConfig, UserError
from gptjax.data.sources.source import Document
from gptjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Words, load_tokenizer, train_tokenizer
from gptjax.data.tokenizers.export import merges_from_scores, write_plain_chat

transformers = None

ANY = st.lists(st.text() | st.sampled_from(TEXTS) | st.text(alphabet=SAMPLE)).map(''.join)
CHATS = [
  [{'role': 'user', 'content': 'Hello there'}],
  [{'role': 'user', 'content': '  \n two lines\n of 日本語 '}, {'role': 'assistant', 'content': 'Hi!\n'},
   {'role': 'user', 'content': '12 + 7?'}],
  [{'role': 'user', 'content': ''}, {'role': 'assistant', 'content': 'def f(x):\n  return x', 'name': None}]]
MARKS = [chr(i) for i in range(0x110000) if not 0xd800 <= i < 0xe000 and i % 7 == 0 or i < 0x3100]


@pytest.fixture(scope='module', autouse=True)
def quiet(references):
  transformers.logging.set_verbosity_error()


def opened(folder):
  return transformers.AutoTokenizer.from_pretrained(str(folder))


def check_texts(tokenizer, reference, texts=TEXTS, **options):
  for text in texts:
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    theirs = reference.encode(text, add_special_tokens=False, **options)
    if tokenizer.kind == 'unigram' and ids != theirs:
      check_equally_likely(tokenizer, reference, text)
    else:
      assert ids == theirs


def check_equally_likely(tokenizer, reference, text):
  """The ids of each word are as likely in one as in the other, such as those of two runs of spaces in either order."""
  score = tokenizer._ids.processor.get_score
  for word in tokenizer.words.split(text):
    ids, theirs = tokenizer.encode(word).tolist(), reference.encode(word, add_special_tokens=False)
    assert ids == theirs or sum(map(score, ids)) == pytest.approx(sum(map(score, theirs)), rel=1e-6)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_published_folder_has_the_ids_of_transformers(name, tmp_path):
  FAMILIES[name](tmp_path)
  tokenizer, reference = load_tokenizer(tmp_path), opened(tmp_path)
  check_texts(tokenizer, reference, split_special_tokens=True)
  assert tokenizer.vocab_size == len(reference)
  assert tokenizer.eos_id == reference.eos_token_id
  assert tokenizer.bos_id == (reference.eos_token_id if name == 'gpt2' else reference.bos_token_id) or reference.bos_token_id is None
  check_start(tokenizer, reference)
  tokenizer.save_hugging_face(tmp_path / 'again')
  check_texts(tokenizer, opened(tmp_path / 'again'), split_special_tokens=True)


def check_start(tokenizer, reference):
  theirs = reference.encode('a', add_special_tokens=True)
  assert theirs[:len(tokenizer.start_ids) + 1] == [*tokenizer.start_ids, tokenizer.encode('a')[0]]


@pytest.mark.parametrize('name', ['llama2', 'mistral', 'gemma'])
def test_so_does_a_folder_with_only_sentencepiece(name, tmp_path):
  spm_folder(tmp_path, name)
  tokenizer, reference = load_tokenizer(tmp_path), opened(tmp_path)
  # transformers loses a space in front of Llama's and Mistral's texts; SentencePiece and we do not.
  check_texts(tokenizer, reference, [text for text in TEXTS if name == 'gemma' or not text.startswith(' ')], split_special_tokens=True)
  check_start(tokenizer, reference)
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | {'add_bos_token': True}))
  check_start(load_tokenizer(tmp_path), opened(tmp_path))
  assert load_tokenizer(tmp_path).start_ids == (tokenizer.bos_id,)


@pytest.mark.parametrize('prompt', [True, False])
@pytest.mark.parametrize('messages', CHATS)
@pytest.mark.parametrize('name', ['llama3', 'qwen2', 'gemma', 'mistral', 'gemma-spm', 'mistral-spm'])
def test_conversations_have_the_ids_of_transformers(name, messages, prompt, tmp_path):
  if name.endswith('spm'):
    spm_folder(tmp_path, name[:-4])
  else:
    FAMILIES[name](tmp_path)
  tokenizer, reference = load_tokenizer(tmp_path), opened(tmp_path)
  theirs = reference.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
  assert tokenizer.chat(messages, prompt).tolist() == theirs


@pytest.mark.parametrize('prompt', [True, False])
@pytest.mark.parametrize('name', ['gpt2', 'bytes'])
def test_plain_conversations_have_the_same_ids_in_transformers_and_imported_again(name, prompt, tmp_path):
  if name == 'bytes':
    plain = ByteTokenizer().with_plain_chat()
    plain.save_hugging_face(tmp_path)
  else:
    FAMILIES[name](tmp_path)
    plain = load_tokenizer(tmp_path).with_plain_chat()
  write_plain_chat(tmp_path, bool(plain.start_ids))
  messages = [*CHATS[1], {'role': 'assistant', 'content': 'It is 19.'}, {'role': 'user', 'content': 'Sure?'}]
  for some in ([{'role': 'system', 'content': 'Be brief.'}, *messages], messages, messages[:2]):
    ids = plain.chat(some, prompt).tolist()
    assert opened(tmp_path).apply_chat_template(some, add_generation_prompt=prompt, return_dict=False) == ids
    assert load_tokenizer(tmp_path).chat(some, prompt).tolist() == ids


def code():
  folder = Path(sysconfig.get_path('stdlib'), 'json')
  return [Document(path.name, path.read_text('utf-8')) for path in sorted(folder.glob('*.py'))]


SYMBOLS = ['<|user|>', '. The', 'ab', 'abc', '日本', '\n\n', 'self']


@pytest.fixture(scope='module', params=['bpe', full('bpe-symbols'), 'unigram', full('bytes'), full('chars')])
def exported(request, tmp_path_factory):
  """A tokenizer of ours, what transformers makes of its export, and what we make of it."""
  folder = tmp_path_factory.mktemp(request.param)
  kind, _, symbols = request.param.partition('-')
  documents = [*code(), Document('texts', SAMPLE), *([Document('marks', ''.join(MARKS))] if kind == 'chars' else [])]
  tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=700), documents, digits=3, symbols=SYMBOLS if symbols else [])
  tokenizer.save_hugging_face(folder)
  return tokenizer, opened(folder), load_tokenizer(folder)


def test_an_exported_tokenizer_gives_the_same_ids_and_texts(exported):
  tokenizer, reference, again = exported
  assert len(reference) == again.vocab_size == tokenizer.vocab_size
  for name in ('pad', 'bos', 'eos', 'unk'):
    assert getattr(reference, f'{name}_token_id') == getattr(again, f'{name}_id') == getattr(tokenizer, f'{name}_id')
  assert again.pieces == tokenizer.pieces and again.start_ids == tokenizer.start_ids
  check_start(tokenizer, reference)
  texts = [SAMPLE, *(document.text for document in code())]
  texts += [text for text in TEXTS if tokenizer.kind != 'chars' or set(text) <= set(tokenizer.characters)]
  check_texts(tokenizer, reference, texts)
  check_texts(tokenizer, reference, [' '.join(SYMBOLS), ''.join(SYMBOLS), 'xabcx  abab', '<s>a</s><pad><unk>'])
  # Python's classes of characters are the exported ones, as far as the two know the same Unicode.
  text = ''.join(character for character in MARKS if character.isprintable() or character.isspace())
  check_texts(tokenizer, reference, [text, 'a'.join(text), ' '.join(text), '1'.join(text)])


def test_so_it_does_for_any_text(exported):
  tokenizer, reference, _ = exported

  @given(text=ANY)
  @settings(max_examples=100, deadline=None, database=None)
  def same(text):
    if tokenizer.kind == 'chars':
      text = ''.join(character for character in text if character in tokenizer.characters)
    check_texts(tokenizer, reference, [text])

  same()


@pytest.mark.parametrize('seed', [0, *map(full, range(1, 6))])
def test_merges_in_their_order_do_what_scores_do(seed, tmp_path):
  """Few letters make pieces that overlap themselves and each other as often as can be."""
  rng = random.Random(seed)
  documents = [Document('a', ' '.join(''.join(rng.choices('xyz' if seed % 2 else 'xy', k=rng.randint(1, 30))) for _ in range(2000)))]
  tokenizer = train_tokenizer(TokenizerConfig(kind='bpe', vocab_size=500), documents)
  tokenizer.save_hugging_face(tmp_path)
  words = [''.join(rng.choices('xyz' if seed % 2 else 'xy', k=rng.randint(1, 60))) for _ in range(3000)]
  runs = ['x' * n for n in range(70)] + ['xy' * n for n in range(40)] + [' ' * n for n in range(70)]
  check_texts(tokenizer, opened(tmp_path), [*words, *runs])


def test_of_equals_that_overlap_the_left_one_is_merged():
  scores = {'x': 0.0, 'y': 0.0, 'xy': -1.0, 'yx': -2.0, 'xyx': -3.0}
  merges = merges_from_scores(scores)
  assert merges.index(('xy', 'x')) < merges.index(('x', 'yx'))  # xy|x|yx
  assert sorted(merges) == sorted([('x', 'y'), ('y', 'x'), ('xy', 'x'), ('x', 'yx')])


def test_gpt2_goes_out_as_it_came(tmp_path):
  FAMILIES['gpt2'](tmp_path / 'published')
  model = json.loads((tmp_path / 'published/tokenizer.json').read_text('utf-8'))['model']
  (tmp_path / 'openai').mkdir()
  (tmp_path / 'openai/encoder.json').write_text(json.dumps(model['vocab'] | {'<|endoftext|>': 400}))
  (tmp_path / 'openai/vocab.bpe').write_text('#version: 0.2\n' + ''.join(f'{left} {right}\n' for left, right in model['merges']), 'utf-8')
  tokenizer = load_tokenizer(tmp_path / 'openai')
  tokenizer.save_hugging_face(tmp_path / 'out')
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {'tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt'}
  check_texts(tokenizer, opened(tmp_path / 'out'))
  (tmp_path / 'out/tokenizer.json').unlink()
  assert load_tokenizer(tmp_path / 'out').sha256 == tokenizer.sha256
  by_name = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path / 'out'))
  check_texts(tokenizer, by_name, split_special_tokens=True)


def test_a_symbol_that_reads_as_bytes_cannot_go_out(tmp_path):
  documents = [*code(), Document('a', 'né ' * 9)]
  tokenizer = train_tokenizer(TokenizerConfig(kind='bpe', vocab_size=512), documents, symbols=['né'])
  with pytest.raises(UserError, match="^symbol: 'né', expected: for Hugging Face's files"):
    tokenizer.save_hugging_face(tmp_path)
  assert isinstance(tokenizer, SentencePieceTokenizer) and isinstance(tokenizer.words, Words)
