"""Stores do not depend on processes and interruptions, and errors in a source are reported."""

import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from memory import Memory, malformed
from small_stores import texts

from gptjax.config import SourceConfig, UserError
from gptjax.data import Contamination, Document, Filters, Recipe, TokenStore, open_source, write_store
from gptjax.data import tokenizing
from gptjax.data.tokenizing import Journal
from gptjax.data.sources import Part
from gptjax.data.tokenizers import ByteTokenizer

ROOT = pathlib.Path(__file__).parents[2]


def folder_bytes(folder):
  return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def documents(count):
  rng = random.Random(0)
  return [Document(f'{i}', ' '.join(rng.choices('alpha beta gamma delta'.split(), k=rng.randrange(1, 60)))) for i in range(count)]


@pytest.fixture
def lines(tmp_path):
  """A file of 3,000 lines, some of them twice."""
  path = tmp_path / 'lines.jsonl'
  path.write_text(''.join(json.dumps({'text': document.text}) + '\n' for document in [*documents(2500), *documents(500)]))
  return path


@pytest.fixture
def small_tasks(monkeypatch):
  """Tasks and parts of some kilobytes, in this process and in those that it starts."""
  monkeypatch.setattr(tokenizing, 'TASK', 20_000)
  from gptjax.data.sources.source import Source
  monkeypatch.setattr(Source, 'part_bytes', 7_000)


def recipe(path, **changes):
  return Recipe(open_source(SourceConfig(str(path))), ByteTokenizer(), **{'deduplicate': True, 'shard_tokens': 50_000} | changes)


def test_every_document_is_stored_once_in_order(lines, tmp_path, small_tasks):
  store = write_store(tmp_path / 'store', recipe(lines))
  expected = list(dict.fromkeys(json.loads(line)['text'] for line in lines.read_text().splitlines()))
  assert texts(store) == expected and store.manifest['shards'] > 3
  assert store.bytes == sum(map(len, expected)) and store.tokens == store.bytes + len(expected)
  assert store.manifest['dropped'] == {'duplicate': 3000 - len(expected)}
  store.verify()


def test_the_number_of_processes_does_not_change_the_store(lines, tmp_path, small_tasks):
  for processes in (1, 3):
    write_store(tmp_path / str(processes), recipe(lines), processes=processes)
  assert folder_bytes(tmp_path / '1') == folder_bytes(tmp_path / '3')
  assert not multiprocessing.active_children()


@pytest.mark.parametrize('kept', [0, 1, 2])
def test_finished_shards_are_kept(lines, tmp_path, small_tasks, monkeypatch, kept):
  """Ended within a shard, at its renaming, or before its commit; then another call resumes."""
  write_store(tmp_path / 'straight', recipe(lines))
  read = []
  real = type(recipe(lines).source).read
  monkeypatch.setattr(type(recipe(lines).source), 'read', lambda self, part: (read.append(part.start), real(self, part))[1])
  commit = Journal.commit

  def ended(journal):
    if len(journal.state.shards) > kept:
      raise KeyboardInterrupt
    commit(journal)

  with monkeypatch.context() as patch:
    patch.setattr(Journal, 'commit', ended)
    with pytest.raises(KeyboardInterrupt):
      write_store(tmp_path / 'store', recipe(lines))
  assert not (tmp_path / 'store').exists()
  before = set(read)
  read.clear()
  write_store(tmp_path / 'store', recipe(lines))
  again = read
  assert len(again) == len(set(again)) and len(before | set(again)) == len(list(recipe(lines).source.parts()))
  assert folder_bytes(tmp_path / 'store') == folder_bytes(tmp_path / 'straight')
  assert kept == 0 or min(again) > 0  # what the finished shards hold was not read


def begun(folder, made, shards, monkeypatch):
  """Interrupts a build after a number of finished shards."""
  commit, calls = Journal.commit, []

  def ended(journal):
    commit(journal)
    calls.append(1)
    if len(calls) > shards:  # the first is the beginning
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Journal, 'commit', ended)
    with pytest.raises(KeyboardInterrupt):
      write_store(folder, made)


def test_an_unfinished_build_of_another_recipe_is_kept(lines, tmp_path, small_tasks, monkeypatch):
  begun(tmp_path / 'store', recipe(lines), 3, monkeypatch)
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'store.building').glob('*.shard')}
  with pytest.raises(UserError, match=r'^--out: .*its 3 finished shards'):
    write_store(tmp_path / 'store', recipe(lines, shard_tokens=60_000))
  write_store(tmp_path / 'store', recipe(lines))
  write_store(tmp_path / 'straight', recipe(lines))
  assert folder_bytes(tmp_path / 'store') == folder_bytes(tmp_path / 'straight')
  assert all((tmp_path / 'store' / path.name).stat().st_mtime_ns == time for path, time in before.items())


def test_another_recipe_replaces_a_build_without_finished_shards(lines, tmp_path, small_tasks, monkeypatch):
  begun(tmp_path / 'store', recipe(lines), 0, monkeypatch)
  write_store(tmp_path / 'store', recipe(lines, deduplicate=False))
  write_store(tmp_path / 'straight', recipe(lines, deduplicate=False))
  assert folder_bytes(tmp_path / 'store') == folder_bytes(tmp_path / 'straight')


@pytest.mark.parametrize('damage', ['shard', 'journal'])
def test_missing_parts_of_an_unfinished_store_are_made_again(lines, tmp_path, small_tasks, monkeypatch, damage):
  begun(tmp_path / 'store', recipe(lines), 3, monkeypatch)
  folder = tmp_path / 'store.building'
  (folder / '00009.partial').touch()
  if damage == 'shard':
    (folder / '00001.shard').unlink()
  else:
    (folder / 'journal.db').write_bytes(b'no database' * 500)
  write_store(tmp_path / 'store', recipe(lines))
  write_store(tmp_path / 'straight', recipe(lines))
  assert folder_bytes(tmp_path / 'store') == folder_bytes(tmp_path / 'straight')


def test_a_kill_before_the_folder_is_renamed_repeats_no_work(lines, tmp_path, small_tasks, monkeypatch):
  write_store(tmp_path / 'store', recipe(lines))
  before = folder_bytes(tmp_path / 'store')
  (tmp_path / 'store').rename(tmp_path / 'store.building')
  for left in ('journal.db', 'journal.db-journal'):
    (tmp_path / 'store.building' / left).touch()
  monkeypatch.setattr(tokenizing, 'encode', None)
  write_store(tmp_path / 'store', recipe(lines))
  assert folder_bytes(tmp_path / 'store') == before


def test_a_build_resumes_with_a_higher_skip_after_an_error(tmp_path, small_tasks):
  path = tmp_path / 'lines.jsonl'
  path.write_text(''.join(json.dumps({'text': document.text}) + '\n' for document in documents(2500)) + 'no JSON\n')
  made = lambda skip: Recipe(open_source(SourceConfig(str(path), skip=skip)), ByteTokenizer(), shard_tokens=50_000)
  with pytest.raises(UserError, match='lines.jsonl:2501'):
    write_store(tmp_path / 'store', made(0.0))
  kept = {file: file.stat().st_mtime_ns for file in (tmp_path / 'store.building').glob('*.shard')}
  assert len(kept) > 3
  store = write_store(tmp_path / 'store', made(0.01))
  assert (store.documents, store.manifest['malformed']) == (2500, 1)
  assert all((tmp_path / 'store' / file.name).stat().st_mtime_ns == time for file, time in kept.items())


def test_a_store_of_another_recipe_is_rejected(lines, tmp_path):
  write_store(tmp_path / 'store', recipe(lines))
  with pytest.raises(UserError, match='^--out: '):
    write_store(tmp_path / 'store', recipe(lines, deduplicate=False))


def test_small_parts_are_combined_and_compressed_ones_count_decompressed():
  part = lambda size, payload=b'': Part('f', 'f', 0, 1, size, payload)
  sizes = [[len(task) for task in tokenizing.tasks_of(parts)] for parts in (
    [part(100)] * 50_000, [part(tokenizing.TASK)] * 3, [part(9, bytes(tokenizing.TASK))] * 3)]
  assert sizes == [[41_944, 8_056], [1, 1, 1], [1, 1, 1]]


COMMAND = [sys.executable, '-m', 'tools.prepare_data', '--tokenizer=bytes', '--deduplicate', '--shard_tokens=1300000']


def test_a_killed_command_resumes_and_leaves_no_process(tmp_path):
  path = tmp_path / 'lines.jsonl'
  with path.open('w') as file:
    for number, document in enumerate(documents(800) * 100):
      file.write(json.dumps({'text': f'{document.text}{number}'}) + '\n')
  command = [*COMMAND, f'--source={path}', '--processes=2']
  subprocess.run([*command, f'--out={tmp_path}/straight'], check=True, cwd=ROOT, capture_output=True)
  process = subprocess.Popen([*command, f'--out={tmp_path}/store'], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  # A second shard is there only when the first one's end is committed; a first may be named and not yet committed.
  while process.poll() is None and len(list(tmp_path.glob('store.building/*.shard'))) < 2:
    time.sleep(0.005)
  assert process.poll() is None
  children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
  process.send_signal(signal.SIGKILL)
  process.wait()
  again = subprocess.run([*command, f'--out={tmp_path}/store'], check=True, cwd=ROOT, capture_output=True, text=True)
  assert 'resuming after' in again.stderr
  assert folder_bytes(tmp_path / 'store') == folder_bytes(tmp_path / 'straight')
  until = time.monotonic() + 20
  while (left := [child for child in children if os.path.exists(f'/proc/{child}')]) and time.monotonic() < until:
    time.sleep(0.05)
  assert children and not left
  assert sorted(path.name for path in tmp_path.iterdir()) == ['lines.jsonl', 'store', 'straight']


def test_filters_and_contamination_are_counted_by_reason(tmp_path):
  records = [Document('short', 'a'), Document('signs', '!?' * 50), Document('good', 'many letters here'),
             Document('test', 'one two three four five six seven eight nine ten')]
  found = Contamination({'exam': [Document('x', 'One two three, four five six seven eight nine!')]})
  store = write_store(tmp_path / 'store', Recipe(Memory(records), ByteTokenizer(), Filters(min_chars=2, min_letters=0.5), found))
  assert texts(store) == ['many letters here']
  assert store.manifest['dropped'] == {'decontamination, exam': 1, 'min_chars': 1, 'min_letters': 1}


def test_the_error_for_a_malformed_record_has_its_line(tmp_path, small_tasks):
  path = tmp_path / 'lines.jsonl'
  path.write_text('{"text": "fine, and long enough to fill parts"}\n' * 5000 + '\n{"text": 3}\n' + '{"text": "fine"}\n' * 10)
  with pytest.raises(UserError, match=r'lines.jsonl:5002: '):
    write_store(tmp_path / 'store', Recipe(open_source(SourceConfig(str(path))), ByteTokenizer()))
  assert [path.name for path in tmp_path.iterdir()] == ['lines.jsonl']


@pytest.mark.parametrize('skip, fits', [(0.3, True), (0.1, False)])
def test_malformed_records_below_a_fraction_are_skipped_and_counted(tmp_path, capsys, skip, fits):
  records = [malformed(i) if i % 5 == 0 else Document(f'{i}', f'text {i}') for i in range(100)]
  make = lambda: write_store(tmp_path / 'store', Recipe(Memory(records, per_part=100, skip=skip), ByteTokenizer()))
  if fits:
    store = make()
    assert (store.documents, store.manifest['malformed'], store.manifest['records']) == (80, 20, 100)
    assert store.manifest['malformed_first'][1].startswith('memory, record 6: ')
    assert 'skipped: memory, record 6: ' in capsys.readouterr().err
  else:
    with pytest.raises(UserError, match=r'^data.source.skip: 0.1, expected: a fraction above the 20 malformed of 100 records'):
      make()
    assert not list(tmp_path.iterdir())


def test_a_source_without_remaining_documents_is_an_error(tmp_path):
  with pytest.raises(UserError, match='none of its 1 records is left, .*min_chars'):
    write_store(tmp_path / 'store', Recipe(Memory([Document('a', 'b')]), ByteTokenizer(), Filters(min_chars=9)))
  assert not list(tmp_path.iterdir())


def test_an_error_in_a_worker_ends_the_build(lines, tmp_path, small_tasks):
  from gptjax.data.tokenizers import CharTokenizer
  with pytest.raises(UserError, match=r"lines.jsonl#\d+, character \d+: '\w', expected: one of the 3 characters"):
    write_store(tmp_path / 'store', Recipe(open_source(SourceConfig(str(lines))), CharTokenizer('abc')), processes=2)
  assert not (tmp_path / 'store.building').exists() and not multiprocessing.active_children()


def test_an_existing_store_is_left_unchanged(lines, tmp_path):
  first = write_store(tmp_path / 'store', recipe(lines))
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'store').rglob('*')}
  assert write_store(tmp_path / 'store', recipe(lines)).sha256 == first.sha256
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'store').rglob('*')} == before
  assert TokenStore.open(tmp_path / 'store').sha256 == first.sha256
