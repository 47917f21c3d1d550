"""The bar of conversations: chat templates in the shape of published ones, and conversations whose texts have control tokens.

In a template, § stands before a token that it looks for in a message and does not write, and @(...) around a token that it puts
together from a role.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptjax.config import UserError
from gptjax.data.tokenizers import load_tokenizer
from tests.acceptance.record import Result, bar
from tests.published_tokenizers import write_shape

CALLS = """{%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}"""
CHATML = """{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
QWEN25 = """{%- if tools %}{{- '<|im_start|>system\\nThese tools exist, in <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{% endfor %}{{- '\\n</tools>\\nCall one within <tool_call></tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}{% if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role }}{% if message.content %}{{- '\\n' + message.content }}{% endif %}""" + CALLS + """
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = """{%- for message in messages %}{% set content = message.content or '' %}
{%- if message.role == 'user' and not (content.startswith('§<tool_response>') and content.endswith('§</tool_response>')) or
       message.role == 'system' %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{% set thoughts = '' %}
{%- if '§</think>' in content %}
{%- set thoughts = content.split('§</think>')[0].rstrip('\\n').split('§<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('§</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}{% if thoughts %}{{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{- content }}
""" + CALLS + """{{- '<|im_end|>\\n' }}{% else %}
{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
R1 = """{{ bos_token }}{% set state = namespace(system='', tool=false) %}{% for message in messages %}{% if message.role == 'system' %}
{%- set state.system = message.content %}{% endif %}{% endfor %}{{ state.system }}
{%- for message in messages %}{% if message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- elif message.role == 'tool' %}{{- '<｜tool▁outputs▁begin｜>' + message.content + '<｜tool▁outputs▁end｜>' }}
{%- elif message.role == 'assistant' %}{% set content = message.content or '' %}
{%- if '§</think>' in content %}{% set content = content.split('§</think>')[-1] %}{% endif %}{{- '<｜Assistant｜>' + content }}
{%- for call in message.tool_calls or [] %}{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name }}
{{- '\\n```json\\n' + call.function.arguments | tojson + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}{{- '<｜end▁of▁sentence｜>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""
PLAIN_TURNS = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ 'User: ' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}{% else %}{{ message.content + '\\n\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
LLAMA2 = """{%- if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}{% endif %}
{%- if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{%- for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' +
  message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA31 = """{{- bos_token }}{% set head = '<|start_header_id|>' %}{{- head + 'system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{% for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}
{{- '<|eot_id|>' }}{% for message in messages %}{% if message.role in ('tool', 'ipython') %}
{{- head + 'ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
{%- elif message.tool_calls %}{% if message.tool_calls | length != 1 %}{{ raise_exception('one call only') }}{% endif %}
{{- head + 'assistant<|end_header_id|>\\n\\n<|python_tag|>' + message.tool_calls[0].function.name + '<|eom_id|>' }}
{%- else %}{{- head ~ message.role ~ '<|end_header_id|>\\n\\n' ~ (message.content | trim) ~ '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- head + 'assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL1 = """{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles alternate') }}{% endif %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token + ' ' }}{% endif %}{% endfor %}"""
MISTRAL3 = """{{ bos_token }}{% if tools %}{{- '[AVAILABLE_TOOLS] [' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}
{{- '][/AVAILABLE_TOOLS]' }}{% endif %}{% for message in messages %}
{%- if message.role in ('user', 'system') %}{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}{{- call.function | tojson }}{% endfor %}
{{- ']' + eos_token }}{% elif message.role == 'assistant' %}{{- ' ' + message.content | trim + eos_token }}
{%- else %}{{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"""
TEKKEN = """{{- bos_token }}{% for message in messages %}{% if message.role == 'system' %}
{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
{%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
{%- else %}{{- message.content ~ eos_token }}{% endif %}{% endfor %}"""
PHI3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{- '<|system|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'user' %}
{{- '<|user|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}
{%- else %}{{ eos_token }}{% endif %}"""
BY_ROLE = """{{ bos_token }}{% for message in messages %}{{- @('<|' + message['role'] + '|>') + '\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
PHI4 = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
GEMMA2 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA3 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}
{%- set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
{%- if message['content'] is string %}{{- message['content'] | trim }}{% else %}{% for part in message['content'] or [] %}
{{- part['text'] | trim }}{% endfor %}{% endif %}{{- '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + eos_token + '\\n' }}
{%- elif message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
COMMAND = """{{ bos_token }}{% for message in messages %}
{%- set who = {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(message.role, '<|SYSTEM_TOKEN|>') %}
{{- '<|START_OF_TURN_TOKEN|>' + who + message.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
OLMO2 = """{{ bos_token }}{% for message in messages %}{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] }}
{%- if message['role'] == 'assistant' %}{% if not loop.last %}{{ eos_token + '\\n' }}{% else %}{{ eos_token }}{% endif %}
{%- else %}{{ '\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
GRANITE = """{%- for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}<|end_of_text|>
{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"""
GLM4 = """[gMASK]<sop>{% for message in messages %}{{ @('<|' ~ message.role ~ '|>') }}
{{ message.content }}{% for call in message.tool_calls or [] %}
{{- '<|observation|>' + call.function.arguments | tojson }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
HARMONY = """{%- macro turn(role, channel, text) %}{{- '<|start|>' + role }}{% if channel %}{{- '<|channel|>' + channel }}{% endif %}
{{- '<|message|>' + text + '<|end|>' }}{% endmacro %}
{{- turn('system', none, 'Channels: analysis, final.') }}{% for message in messages %}
{%- if '§<|channel|>' in message.content %}{{ raise_exception('text has channels, such as §<|channel|>') }}{% endif %}
{{- turn(message.role, 'final' if message.role == 'assistant' else none, message.content) }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""


@dataclasses.dataclass(frozen=True)
class Chat:
  """A template and its tokenizer: the shape of its text, special tokens (the first two are bos and eos), other added ones."""

  template: str
  shape: str
  special: tuple[str, ...]
  others: tuple[str, ...] = ()
  strips: bool = False
  """whether the tokens behind bos and eos strip white space on their right"""
  uncontrolled: tuple[str, ...] = ()
  """added tokens that the template does not write"""


_END, _S, _IM = ('<|endoftext|>', '<|endoftext|>'), ('<s>', '</s>'), ('<|endoftext|>', '<|im_end|>', '<|im_start|>')
_LLAMA = ('<|begin_of_text|>', '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>')
_TURNS, _PHI = ('<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'), ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>')
_TOOLS, _INST = ('<tool_call>', '</tool_call>'), ('[INST]', '[/INST]')
CHATS = {
  'chatml': Chat(CHATML, 'bytes', _IM),
  'qwen2': Chat(DEFAULT_SYSTEM + CHATML, 'bytes', _IM),
  'smollm2': Chat(DEFAULT_SYSTEM.replace('help', 'are small') + CHATML, 'bytes', ('<|im_start|>', '<|im_end|>'), strips=True),
  'qwen2.5': Chat(QWEN25, 'bytes', _IM, _TOOLS, uncontrolled=('<|fim_prefix|>',)),
  'qwen3': Chat(QWEN3, 'bytes', _IM, ('<think>', '</think>', '<tool_response>', '</tool_response>', *_TOOLS)),
  'r1-distill': Chat(R1, 'bytes', ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'), (
    '<｜User｜>', '<｜Assistant｜>', '<think>', '<｜tool▁call▁begin｜>', '<｜tool▁call▁end｜>', '<｜tool▁sep｜>',
    '<｜tool▁outputs▁begin｜>', '<｜tool▁outputs▁end｜>'), uncontrolled=('</think>',)),
  'deepseek-llm': Chat(PLAIN_TURNS, 'bytes', ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>')),
  'llama2': Chat(LLAMA2, 'prepended', _S),
  'vicuna': Chat(PLAIN_TURNS, 'prepended', _S),
  'llama3': Chat(LLAMA3, 'bytes', _LLAMA),
  'llama3.1': Chat(LLAMA31, 'bytes', (*_LLAMA, '<|python_tag|>', '<|eom_id|>')),
  'mistral-v1': Chat(MISTRAL1, 'metaspace', _S),
  'mistral-v3': Chat(MISTRAL3, 'metaspace', (*_S, *_INST, '[AVAILABLE_TOOLS]', '[/AVAILABLE_TOOLS]', '[TOOL_CALLS]', '[TOOL_RESULTS]',
                                             '[/TOOL_RESULTS]')),
  'mistral-tekken': Chat(TEKKEN, 'bytes', (*_S, *_INST, '[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]')),
  'phi3': Chat(PHI3, 'prepended', ('<s>', '<|endoftext|>', *_PHI), strips=True),
  'phi3-small': Chat(BY_ROLE, 'bytes', (*_END, *_PHI)),
  'phi4': Chat(PHI4, 'bytes', (*_IM, '<|im_sep|>'), strips=True),
  'gemma2': Chat(GEMMA2, 'spaced', _TURNS),
  'gemma3': Chat(GEMMA3, 'spaced', _TURNS),
  'zephyr': Chat(ZEPHYR, 'metaspace', _S),
  'command-r': Chat(COMMAND, 'bytes', ('<BOS_TOKEN>', '<|END_OF_TURN_TOKEN|>', '<|START_OF_TURN_TOKEN|>', '<|USER_TOKEN|>',
                                       '<|CHATBOT_TOKEN|>', '<|SYSTEM_TOKEN|>')),
  'olmo2': Chat(OLMO2, 'bytes', _END, uncontrolled=('|||PHONE|||',)),
  'granite': Chat(GRANITE, 'bytes', ('<|end_of_text|>', '<|end_of_text|>', '<|start_of_role|>', '<|end_of_role|>')),
  'glm4': Chat(GLM4, 'bytes', _END, ('[gMASK]', '<sop>', '<|system|>', '<|user|>', '<|assistant|>', '<|observation|>')),
  'harmony': Chat(HARMONY, 'bytes', ('<|startoftext|>', '<|return|>', '<|start|>', '<|end|>', '<|message|>', '<|channel|>'))}

TOOL = {'type': 'function', 'function': {'name': 'weather', 'description': 'The weather of a place.', 'parameters': {'place': 'string'}}}
CALL = {'type': 'function', 'function': {'name': 'weather', 'arguments': {'place': 'Oslo'}}}
FORMS = [
  [('user', 'Hello  there ')],
  [('user', ' Hello'), ('assistant', '<think>\nwell\n</think>\n\nHi!\n'), ('user', 'def f(x):\n    return x')],
  [('system', 'Be brief.\n'), ('user', 'Hello'), ('assistant', ' Yes? '), ('user', '日本, 12')],
  [('user', 'Oslo?'), ('assistant', ''), ('tool', 'rain'), ('assistant', 'It  rains.'), ('user', 'Thanks')]]


def conversations(chat: Chat) -> Iterator[tuple[list[dict], list[dict] | None]]:
  """Messages and tools: each form with control tokens in every text but the roles, alone, in words, in spaces, cut and repeated."""
  tokens = [*dict.fromkeys((*chat.special, *chat.others))]
  first, last = tokens[0], tokens[-1]
  forged = ['', f'{tokens[1 % len(tokens)]}', f' a{first}b ', f' {last} \n {last}  ', ''.join(tokens), ' '.join(tokens) + '\n\n',
            f'{last[:-1]}{last}{last[1:]}{first[:3]}{first}']
  for form in FORMS:
    for text in forged:
      tool = json.loads(json.dumps(TOOL).replace('place', f'place{json.dumps(text)[1:-1]}'))
      call = json.loads(json.dumps(CALL).replace('Oslo', f'Oslo{json.dumps(text)[1:-1]}'))
      messages = [{'role': role, 'content': text + content + text} for role, content in form]
      if form is FORMS[-1]:
        messages[1]['tool_calls'] = [call]
      yield messages, [tool] if form is FORMS[-1] else None


def write_chat(folder: Path, chat: Chat) -> None:
  """The folder of a published model."""
  bos, eos = chat.special[:2]
  config = {'bos_token': bos, 'eos_token': eos}
  write_shape(folder, chat.shape, [*dict.fromkeys(chat.special)], [*chat.others, *chat.uncontrolled], config,
              chat.template.replace('§', '').replace('@(', '('))
  if chat.strips:
    described = json.loads((folder / 'tokenizer.json').read_text('utf-8'))
    for token in described['added_tokens']:
      token['rstrip'] = token['content'] in chat.special[2:]
    (folder / 'tokenizer.json').write_text(json.dumps(described), 'utf-8')


def reference(folder: Path, chat: Chat) -> Callable[[list, list | None, bool], list[int] | None]:
  """A function from messages and tools to the ids of the same tokenizer with its control tokens renamed, None if the template refuses."""
  names = {token: f'\ue000{i}\ue001' for i, token in enumerate(dict.fromkeys((*chat.special, *chat.others)))}
  rename = lambda text: names.get(text, text)
  described = json.loads((folder / 'tokenizer.json').read_text('utf-8'))
  described['model']['vocab'] = {rename(text): i for text, i in described['model']['vocab'].items()}
  for token in described['added_tokens']:
    token['content'] = rename(token['content'])
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
  environment.globals |= {'raise_exception': _refuse, 'renamed': rename}
  written = '|'.join(f'(?<!§){re.escape(token)}' for token in sorted(names, key=len, reverse=True))
  source = re.sub(written, lambda found: names[found[0]], chat.template.replace('@(', 'renamed('))
  template = environment.from_string(source.replace('§', ''))
  bos, eos = map(rename, chat.special[:2])

  def ids(messages, tools, add_generation_prompt):
    try:
      text = template.render(messages=messages, tools=tools, bos_token=bos, eos_token=eos, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError:
      return None
    return tokenizer.encode(text, add_special_tokens=False).ids

  return ids


def _refuse(message):
  raise jinja2.TemplateError(message)


def different(folder: Path, chat: Chat) -> Iterator[tuple[list, list[int] | None, list[int] | None]]:
  """Conversations, with and without the start of an answer, whose ids are not those of the reference: messages, ids, expected ids."""
  write_chat(folder, chat)
  tokenizer, expected = load_tokenizer(folder), reference(folder, chat)
  for messages, tools in conversations(chat):
    for prompt in (True, False):
      theirs = expected(messages, tools, prompt)
      try:
        ours = tokenizer.chat(messages, prompt, tools=tools).tolist()
      except UserError:
        ours = None
      if ours != theirs:
        yield messages, ours, theirs


@bar
def chats(folder: Path) -> Result:
  wrong = {name: len({str(messages) for messages, _, _ in different(folder / name, chat)}) for name, chat in CHATS.items()}
  count = sum(len([*conversations(chat)]) for chat in CHATS.values())
  told = ', '.join(f'{name} {n}' for name, n in wrong.items() if n)
  return Result('25 templates of published shapes, 28 conversations with control tokens in every text: ids of the same tokenizer with '
                'its control tokens renamed', f'{len(CHATS)} templates, {count} conversations; other ids: {told or "none"}',
                len(CHATS) == 25 and count == 700 and not told, 'python -m tests.acceptance --only=chats')
