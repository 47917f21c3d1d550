"""A line of JSON yields one document, or an error with its location, also in parts and compressed files."""

import gzip
import json
import re

import pytest
import zstandard
from hypothesis import given, settings, strategies as st

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import Document, Malformed, open_source, malformed_error


def open_lines(path, **config):
  return open_source(SourceConfig(path=str(path), **config))


def read_line(tmp_path, line, text='text'):
  (tmp_path / 'a.jsonl').write_bytes(line)
  source = open_lines(tmp_path / 'a.jsonl', text=text)
  (part,) = source.parts()
  (record,) = source.read(part)
  return str(malformed_error(source, part, record, 4)).partition('a.jsonl')[2] if isinstance(record, Malformed) else record


def errors(source):
  """The errors of all malformed records, with records counted as a consumer counts them."""
  counts, found = {}, []
  for part in source.parts():
    records = list(source.read(part))
    before = counts.get(part.file, 0)
    found += [str(malformed_error(source, part, record, before)) for record in records if isinstance(record, Malformed)]
    counts[part.file] = before + len(records)
  return found


LINES = st.lists(st.sampled_from(['{"text": "é"}', '{"text": "a\\nb", "x": 1}', '', '   ', '[]', '{', '{"text": ""}', '\r']),
                 min_size=1, max_size=12)


@given(lines=LINES, step=st.integers(1, 80), last=st.sampled_from(['', '\n']))
@settings(max_examples=300, deadline=None, database=None)
def test_lines_in_parts_are_the_lines_of_the_file(tmp_path_factory, lines, step, last):
  text = '\n'.join(lines) + last or '\n'
  for ending, pack in {'': bytes, '.gz': gzip.compress, '.zst': zstandard.compress}.items():
    path = tmp_path_factory.getbasetemp() / f'lines.jsonl{ending}'
    path.write_bytes(pack(text.encode()))
    source = open_lines(path)
    source.step = step
    parts = list(source.parts())
    read = {part: list(source.read(part)) for part in reversed(parts)}
    documents = [record for part in parts for record in read[part] if isinstance(record, Document)]
    good = [line for line in lines if 'é' in line or 'a' in line]
    assert [document.text for document in documents] == [json.loads(line)['text'] for line in good]
    assert [text.encode()[int(d.name.partition('#')[2]):].decode().split('\n')[0] for d in documents] == good
    assert [error.partition(', expected')[0] for error in errors(source)] == [
        f'{path}:{i + 1}: {line!r}' for i, line in enumerate(lines) if line in ('[]', '{')]


@pytest.mark.parametrize(('line', 'error'), [
    (b'nonsense', ":5: 'nonsense', expected: a JSON object on a line of its own"),
    (b'{"text": NaN}', """:5: '{"text": NaN}', expected: a JSON object on a line of its own"""),
    (b'[' * 100_000, f":5: '{'[' * 59}…', expected: a JSON object on a line of its own"),
    (b'"text"', """:5: '"text"', expected: a JSON object on a line of its own"""),
    (b'{"txet": "a", "id": 1}', ":5: 'text', expected: a field that the record has: txet, id; did you mean txet?"),
    (b'{"a.b": "a", "c": {"d": {"e": 1}}}', ":5: 'text', expected: a field that the record has: a.b, c.d.e"),
    (br'{"\ufefftext": "a"}', r":5: 'text', expected: a field that the record has: '\ufefftext'"),
    (b'{}', ":5: 'text', expected: a field that the record has: none"),
    (b'{"text": null}', ":5: 'None', expected: text in the field text"),
    (b'{"text": 3}', ":5: '3', expected: text in the field text"),
    (b'{"text": ["a"]}', """:5: "['a']", expected: text in the field text"""),
    (b'{"text": "a\xff"}', """:5: b'\\xff"}', expected: UTF-8 text"""),
    (b'{"text": "a\\ud800b"}', ":5: '\\ud800b', expected: UTF-8 text in the field text"),
])
def test_the_error_for_a_malformed_line_has_its_number(tmp_path, line, error):
  assert read_line(tmp_path, line) == error


@pytest.mark.parametrize(('template', 'line', 'text'), [
    ('body', '{"body": "a"}', 'a'), ('a.b', '{"a": {"b": "c"}}', 'c'), ('{a.b}!', '{"a": {"b": "c"}}', 'c!'),
    (r'{q}\n\t{a}', '{"q": "Q", "a": "A"}', 'Q\n\tA'), ('{{{q}}}', '{"q": "Q"}', '{Q}'), ('{n} {x}', '{"n": 3, "x": 0.5}', '3 0.5'),
    ('a.b', '{"a.b": "c", "a": {"b": "d"}}', 'c'), ('{a.b.c}{x.y}', '{"a": {"b.c": "d"}, "a.b": {"c": "e"}, "x": {"y": "f"}}', 'ef'),
    ('a.b', '{"a": {"b": "c"}, "a.c": 1}', 'c'), ('text', '{"text": "\ufeffa\ufeffb"}', 'ab'), ('text', r'{"text": "\ufeffa"}', 'a'),
    ('{my field}', '{"my field": "a"}', 'a'), ('text', r'{"text": "\ud83d\ude00"}', '😀'),
])
def test_text_is_a_field_or_a_template(tmp_path, template, line, text):
  assert read_line(tmp_path, line.encode(), template) == Document('a.jsonl#0', text)


@pytest.mark.parametrize(('template', 'line', 'error'), [
    ('{q}', '{"q": null}', "'None', expected: text or a number in the field q"),
    ('{q}', '{"q": true}', "'True', expected: text or a number in the field q"),
    ('{q}', '{"q": {}}', "'{}', expected: text or a number in the field q"),
    ('{q.x}', '{"q": {"y": 1}}', "'q.x', expected: a field that the record has: q.y; did you mean q.y?"),
    ('{q.x}', '{"q": 1}', "'q.x', expected: a field that the record has: q"),
])
def test_values_that_a_template_cannot_use_are_malformed(tmp_path, template, line, error):
  assert read_line(tmp_path, line.encode(), template) == f':5: {error}'


@pytest.mark.parametrize('template', ['{', '{a', '{}', '{a!r}', '{a:>3}', '{a[0]}', '{a.}', '{a..b}', '{{a}}', '{a}}'])
def test_invalid_templates_are_errors(tmp_path, template):
  (tmp_path / 'a.jsonl').write_text('{"a": "b"}')
  with pytest.raises(UserError, match=r'^data.source.text: '):
    open_lines(tmp_path, text=template)


def test_records_are_counted_per_file(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / f'{name}.jsonl').write_text('{"text": "x"}\n\n7\n')
  assert [error.partition(' ')[0] for error in errors(open_lines(tmp_path))] == [f'{tmp_path}/{n}.jsonl:3:' for n in 'ab']


def test_json_files_are_read_if_there_are_no_others(tmp_path):
  (tmp_path / 'a.json').write_text('{"text": "x"}\n')
  assert [document.text for document in open_lines(tmp_path)] == ['x']


def test_a_list_of_objects_is_read_as_its_objects(tmp_path):
  records = [{'text': f'é{i}\n[{{', 'n': i} for i in range(5)]
  (tmp_path / 'list.json').write_bytes(b'\xef\xbb\xbf\n ' + json.dumps(records, indent=2).encode())
  (tmp_path / 'lines.json').write_text('\n'.join(map(json.dumps, records)))
  found = {name: list(open_lines(tmp_path / f'{name}.json', text='{n}{text}')) for name in ('list', 'lines')}
  assert [one.text for one in found['list']] == [one.text for one in found['lines']] == [f'{i}é{i}\n[{{' for i in range(5)]
  assert [one.name for one in found['list']] == [f'list.json#{i}' for i in range(5)]


@pytest.mark.parametrize('content, error', [
  ('[{"text": "a"}, 3]', 'list.json, object 2: .3., expected: a JSON object'),
  ('[{"text": "a"}, {"txt": "b"}]', 'list.json, object 2: .text.'),
  ('[{"text": "a"}', "list.json: .*expected: a list of JSON objects"), ('[NaN]', 'list.json: .*a list of JSON objects')])
def test_errors_in_a_list_name_the_object(content, error, tmp_path):
  (tmp_path / 'list.json').write_text(content)
  found, = errors(open_lines(tmp_path / 'list.json'))
  assert re.search(error, found)
