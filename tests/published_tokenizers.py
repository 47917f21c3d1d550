"""Small tokenizers in the exact shape of published families, and folders of them as Hugging Face has them."""

import functools
import io
import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gptjax.data.tokenizers.export import merges_from_scores

SAMPLE = '''It's the reader's choice: they'll read 1,234 pages, or we've read them all by 2024 -- isn't that so?
  The lines that are indented,    and the words that stand apart;\tthen a tab, and déjà vu, naïve, 日本語 日本, Привет мир.
def main(argv=None):\n    return [x for x in argv if x == '--help']\n\n\nمرحبا بالعالم नमस्ते 😀 once upon a time there was
<s> </s> <pad> <bos> <|im_start|> 3.14159 0x7f THE QUICK brown-fox_jumps over 12 lazy dogs; again and again and again
'''
TEXTS = [
  '', ' ', '  ', '   a', ' a', 'a', 'a ', 'a  b   c    d', '\n', '\n\n', '\n\n\n', 'a\nb', '\n a', '\t\t', ' \n \t\n', '\r\n',
  SAMPLE, 'Hello world!', 'déjà vu, naïve', 'e\u0301', '日本語のテキスト', 'Привет, мир', 'مرحبا بالعالم', 'नमस्ते', '😀👩\u200d👧',
  '1234567890', '3.14', "they'll WE'VE I'm", 'def f(x):\n    return x  # why\n', '<s>', '</s>', '<pad>', '<unk>', '<|im_end|>',
  'a<|im_end|>b', '<start_of_turn>user', '[INST]', '<0x41>', '<|eot_id|>', '<|endoftext|>', 'continue', ' continue', '\x00',
  '\x1c\x1f\x85', '\u3000\xa0\u2028', '\ufeff', '\U0010ffff', 'Ġa', 'x' * 300]

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('no tools') }}{% endif %}
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' %}
    {{- head + (message['content'] if message['content'] is string else message['content'] | tojson) | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('Gemma knows no system role') }}{% endif %}
{% for message in messages %}{% if message.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message.role %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{%- set state = namespace(turn=0) %}{{ bos_token }}
{%- for message in messages %}
  {%- if loop.index0 > 50 %}{% break %}{% endif %}
  {%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
  {%- elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
  {%- else %}{{ raise_exception('user and assistant only') }}{% endif %}
{%- endfor %}"""


def _byte_level(folder, words, specials, config, *, normalizer=None, ignore_merges=False, added=(), template=None):
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(words), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  tokenizer.decoder = decoders.ByteLevel()
  if normalizer:
    tokenizer.normalizer = normalizer
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  tokenizer.train_from_iterator([SAMPLE] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
  described = json.loads(tokenizer.to_str())
  if ignore_merges:
    described['model']['ignore_merges'] = True
    described['model']['vocab']['Ġcontinue'] = len(described['model']['vocab'])  # no merges lead to it
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
  tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
  tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in specials])
  _write(folder, json.loads(tokenizer.to_str()), config, template)


def _write(folder, described, config, template=None, **others):
  folder.mkdir(parents=True, exist_ok=True)
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **config}
  if template and not others.get('jinja'):
    config['chat_template'] = template
  elif template:
    (folder / 'chat_template.jinja').write_text(template)
  if described:
    (folder / 'tokenizer.json').write_text(json.dumps(described, ensure_ascii=False), 'utf-8')
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


def gpt2(folder):
  end = '<|endoftext|>'
  _byte_level(folder, _GPT2, [end], {'bos_token': end, 'eos_token': end, 'unk_token': end})


def qwen2(folder):
  specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  config = {'bos_token': None, 'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>', 'unk_token': None}
  _byte_level(folder, _CL100K.replace('{1,3}', ''), specials, config, normalizer=normalizers.NFC(), added=['<think>', '</think>'],
              template=CHATML)
  (folder / 'config.json').write_text(json.dumps({'bos_token_id': 402, 'eos_token_id': 404}))
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [404, 402], 'pad_token_id': 402}))


def llama3(folder):
  specials = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
  config = {'bos_token': '<|begin_of_text|>', 'eos_token': {'content': '<|eot_id|>', 'lstrip': False, '__type': 'AddedToken'}}
  _byte_level(folder, _CL100K, specials, config, ignore_merges=True, template=LLAMA3)
  (folder / 'generation_config.json').write_text(json.dumps({'bos_token_id': 401, 'eos_token_id': [402, 405]}))


def olmo2(folder):
  config = {'bos_token': '<|endoftext|>', 'eos_token': '<|endoftext|>', 'pad_token': '<|pad|>'}
  _byte_level(folder, _CL100K, ['<|endoftext|>', '<|pad|>'], config, added=['  \n', '|||PHONE|||'])


@functools.cache
def spm(prefix, symbols=(), kind='bpe', vocab_size=700, **options):
  """A SentencePiece model as Llama 2, Mistral (with prefix) and Gemma (without) have it."""
  model = io.BytesIO()
  ids = {'pad_id': 0, 'eos_id': 1, 'bos_id': 2, 'unk_id': 3, 'bos_piece': '<bos>', 'eos_piece': '<eos>'} if symbols else {'pad_id': -1}
  settings = {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False, 'split_digits': True} | ids | options
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(SAMPLE.split('\n') * 3), model_writer=model, model_type=kind, vocab_size=vocab_size, byte_fallback=True,
    add_dummy_prefix=prefix, user_defined_symbols=list(symbols), hard_vocab_limit=False, minloglevel=2, **settings)
  return model.getvalue()


TURNS = ('<start_of_turn>', '<end_of_turn>', '\n\n')


def _described(model, normalizer, words, steps, specials, added=()):
  processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
  scores = {piece: processor.get_score(i) for i, piece in enumerate(pieces)
            if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or piece in added)}
  vocab = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges_from_scores(scores), unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  if normalizer:
    tokenizer.normalizer = normalizer
  if words:
    tokenizer.pre_tokenizer = words
  tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *steps])
  tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added if text not in specials])
  tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in specials])
  return json.loads(tokenizer.to_str())


_NAMES = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}


def write_shape(folder, shape, specials, added, config, template=None, **others):
  """A folder with tokenizer.json: of bytes, or of SentencePiece with a prepended space, with Metaspace or without a prefix."""
  strip, unknown = [decoders.Strip(' ', 1, 0)], ['<unk>', *specials]
  match shape:
    case 'bytes':
      return _byte_level(folder, _CL100K, specials, config, added=added, template=template)
    case 'prepended':
      prepend = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
      described = _described(spm(True), prepend, None, strip, unknown, added)
    case 'metaspace':
      described = _described(spm(True), None, pre_tokenizers.Metaspace('▁', 'first', False), strip, unknown, added)
    case 'spaced':
      words = pre_tokenizers.Split(' ', 'merged_with_previous')
      described = _described(spm(False, TURNS), normalizers.Replace(' ', '▁'), words, [], ['<pad>', *unknown], [*added, *TURNS])
  _write(folder, described, {'unk_token': '<unk>', **config}, template, **others)


def llama2(folder):
  write_shape(folder, 'prepended', ['<s>', '</s>'], [], _NAMES)


def mistral(folder):
  write_shape(folder, 'metaspace', ['<s>', '</s>', '[INST]', '[/INST]'], [], _NAMES, MISTRAL, jinja=True)


def gemma(folder):
  names = {'bos_token': '<bos>', 'eos_token': '<eos>', 'pad_token': '<pad>'}
  write_shape(folder, 'spaced', ['<eos>', '<bos>', *TURNS[:2]], [], names, GEMMA)
  (folder / 'generation_config.json').write_text(json.dumps({'bos_token_id': 2, 'eos_token_id': [1, 5], 'pad_token_id': 0}))


FAMILIES = {'gpt2': gpt2, 'qwen2': qwen2, 'llama3': llama3, 'olmo2': olmo2, 'llama2': llama2, 'mistral': mistral, 'gemma': gemma}
BYTE_LEVEL = ('gpt2', 'qwen2', 'llama3', 'olmo2')


def spm_folder(folder, name):
  """A folder with tokenizer.model and no tokenizer.json: of 'llama2', 'mistral' or 'gemma'."""
  added = lambda texts, first: {str(first + i): {'content': text, 'special': True, 'normalized': False, 'lstrip': False, 'rstrip': False,
                                                 'single_word': False} for i, text in enumerate(texts)}
  match name:
    case 'llama2':
      _write(folder, None, {'tokenizer_class': 'LlamaTokenizer', 'legacy': False, **_NAMES})
    case 'mistral':
      count = sentencepiece.SentencePieceProcessor(model_proto=spm(True)).vocab_size()
      config = {'tokenizer_class': 'LlamaTokenizer', 'legacy': False, 'added_tokens_decoder': added(['[INST]', '[/INST]'], count)}
      _write(folder, None, config | _NAMES, MISTRAL)
    case 'gemma':
      config = {'tokenizer_class': 'GemmaTokenizer', 'added_tokens_decoder': added(TURNS[:2], 4)}
      _write(folder, None, config | {'bos_token': '<bos>', 'eos_token': '<eos>'}, GEMMA)
  (folder / 'tokenizer.model').write_bytes(spm(False, TURNS) if name == 'gemma' else spm(True))
