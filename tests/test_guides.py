"""Every command of the guides does what they say, in their order."""

import json
import math
import re

import pytest
from documented import ROOT, commands_of, resolve, run

GUIDES = sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md') if commands_of(f'docs/{path.name}'))


@pytest.mark.parametrize('page', GUIDES)
def test_commands_of_a_guide_resolve(page):
  resolve(commands_of(page))


def test_a_wrong_command_does_not_resolve():
  for command, error in (('python -m gptjax.train --config=configs/default.py --config.no_such=1', 'no_such'),
                         ('python -m tools.replay --workdir=runs/never --step=3', 'runs/never: no such file')):
    with pytest.raises(AssertionError, match=error):
      resolve([command])


@pytest.mark.full
def test_commands_of_the_guide_to_data_run_as_written(tmp_path):
  printed = list(run(commands_of('docs/data.md'), tmp_path).values())
  assert len(printed) == 8 and 'bytes per token' in printed[0]
  assert 'verified: all 1 shards' in printed[4] and 'stores/readme' in printed[5] and '0.2500' in printed[5]
  assert (tmp_path / 'mixture.png').read_bytes().startswith(b'\x89PNG')
  score = json.loads(printed[7].splitlines()[-1])
  assert {*score['sets']} == {'licence', 'readme'} and {*score['tags']} == {'law'}


@pytest.mark.full
def test_commands_of_the_guide_to_evaluation_run_as_written(tmp_path):
  pytest.importorskip('lm_eval')
  for name, text in {'lambada/lambada_test.jsonl': '{"text": "the cat sat on the mat"}\n' * 3, 'piqa/valid-labels.lst': '0\n1\n',
                     'piqa/valid.jsonl': '{"goal": "sit", "sol1": "use a chair", "sol2": "use a door"}\n' * 2}.items():
    (tmp_path / 'task_data' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'task_data' / name).write_text(text)
  printed = list(run(commands_of('docs/evaluation.md'), tmp_path).values())
  last = [[json.loads(line) for line in text.splitlines() if line.startswith('{')] for text in printed]
  assert [[one['step'] for one in some] for some in last] == [[], [8], [4, 8], [4, 8]]
  workdir = tmp_path / 'runs/evaluated'
  assert {*last[1][0]['sets']} == {'valid'} and json.loads((workdir / 'evaluation.json').read_text()).items() >= last[1][0].items()
  assert all({*one['sets']} == {'valid', 'readme'} for one in last[2]) and last[2][1]['sets']['valid'] == last[1][0]['sets']['valid']
  assert [json.loads(line) for line in (workdir / 'evaluations.jsonl').read_text().splitlines()] == last[3]
  assert all(one['tasks']['lambada']['examples'] == 3 and 0 <= one['tasks']['piqa']['acc'] <= 1 for one in last[3])
  assert len((tmp_path / 'answers.jsonl').read_text().splitlines()) == 2 * (3 + 2)
  assert (workdir / 'evaluation.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.full
def test_commands_of_the_guide_to_clusters_run_as_written(tmp_path):
  commands = commands_of('docs/clusters.md')
  assert len(commands) == 5
  run(commands, tmp_path)
  scores = [[json.loads(line)['eval/valid/loss'] for line in file.read_text().splitlines() if 'eval/valid/loss' in line]
            for file in sorted((tmp_path / 'runs').glob('*/metrics.jsonl'))]
  assert len(scores) == sum('gptjax.train' in command for command in commands)
  assert scores[0] and all(score == pytest.approx(scores[0], rel=1e-5) for score in scores)


@pytest.mark.full
def test_commands_of_the_guide_to_finetuning_run_as_written(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  words = (ROOT / 'docs/finetuning.md').read_text().split()
  messages = (f'{"spam" if i % 3 == 2 else "ham"}\t{" ".join(words[8 * i:8 * i + 8])}{" WIN CASH NOW" * (i % 3 == 2)}' for i in range(180))
  (tmp_path / 'SMSSpamCollection').write_text('\n'.join(messages))
  (tmp_path / 'data/books').mkdir(parents=True)
  for name in ('a', 'b'):
    (tmp_path / f'data/books/{name}.txt').write_text(''.join(path.read_text() for path in (ROOT / 'docs').glob('*.md')))
  # As written, they take minutes.
  steps = {'sft_sums': 60, 'spam': 30, 'base_small': 2, 'spam_from_base': 2, 'preferences': 20, 'addition_grpo': 2, 'addition_distilled': 2}
  recipe = lambda command: (re.findall(r'--config=configs/(\w+).py', command) or [''])[0]
  shorter = [f'{command} --config.steps={steps[recipe(command)]} --config.eval.every=0 --config.checkpoint.every=0'
             if recipe(command) in steps else command for command in commands_of('docs/finetuning.md')]
  shorter = [f'{command} --stop_at=220' if recipe(command) == 'addition_sft' and '--stop_at' not in command else command
             for command in shorter]
  (_, prepared, scored, answers, made, _, spam, one, _, _, tuned, _, gladly, merged, _, preferred, sums, _, half, _,
   rewarded, _, _, taught) = run(shorter, tmp_path).values()
  assert '⟦' in prepared and '500 documents' in prepared
  score = json.loads(scored.splitlines()[-1])
  assert {*score['sets']} == {'test'} and score['tokens'] == pytest.approx(29 * 1000, rel=0.1) and score['loss'] < 1.5
  assert 'Gladly. ' in gladly and 'Gladly' not in answers and 'merged step 60' in merged
  first, *_, last = map(json.loads, (tmp_path / 'runs/sums_preferred/metrics.jsonl').read_text().splitlines())
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-5)
  assert json.loads(preferred.splitlines()[-1])['accuracy'] == pytest.approx(last['eval/valid/accuracy'])
  assert len(answers.splitlines()) >= 2
  assert made == 'data/spam/train.jsonl: 96 messages\ndata/spam/test.jsonl: 24 messages\n' and {*one.split()[::2]} == {'ham', 'spam'}
  figures = [json.loads(text.splitlines()[-1])['sets']['test'] for text in (spam, tuned)]
  assert [found['texts'] for found in figures] == [24, 24] and figures[0]['accuracy'] > 0.8
  assert sums.splitlines()[0] == 'valid.jsonl: 2,500 sums'
  figures = [json.loads(line) for line in half.splitlines() if line.startswith('{')]
  assert [one['step'] for one in figures] == [140, 160, 180, 200] and figures[0]['pass@1'] < figures[-1]['pass@1'] < figures[-1]['pass@8']
  assert json.loads(rewarded.splitlines()[-1])['examples'] == 2500
  assert 0 < json.loads(taught.splitlines()[-1])['pass@1'] < 1


@pytest.mark.full
def test_commands_of_the_guide_to_sweeps_run_as_written(tmp_path):
  planned, swept = run(commands_of('docs/sweeps.md'), tmp_path).values()
  assert '6 trials, 6 left: about' in planned and swept.startswith('6 done; see ')
  out = tmp_path / 'sweeps/first'
  assert len((out / 'trials.csv').read_text().splitlines()) == 7 and '<svg' in (out / 'report.html').read_text()
  sweep, settings = {}, {}
  exec('\n'.join(commands_of('docs/sweeps.md', 'python')), sweep)
  exec((out / 'best.py').read_text(), settings)
  assert len(sweep['get_sweep']().points) == 6 and settings['get_config']().steps == 60


@pytest.mark.full
def test_commands_of_the_guide_to_models_run_as_written(tmp_path):
  printed = list(run(commands_of('docs/models.md'), tmp_path).values())
  assert len(printed) == 7 and all('roundtrip: all 24 tensors have the same bits' in words for words in printed[1:3])
  assert printed[3].startswith('Permission')
  models = [json.loads((tmp_path / f'runs/{name}/config.json').read_text())['model'] for name in ('again', 'tuned', 'tuned_too')]
  assert models[1] == models[0] | {'dropout': 0.1} and models[2] == models[0]
  assert len((tmp_path / 'samples.jsonl').read_text().splitlines()) == 3


@pytest.mark.full
def test_commands_of_the_guide_to_sharding_run_as_written(tmp_path):
  found = run(commands_of('docs/sharding.md'), tmp_path)
  schedule, table = (next(out for command, out in found.items() if name in command) for name in ('draw_schedule', 'zero_bytes'))
  assert all(line in (ROOT / 'docs/sharding.md').read_text() for line in schedule.splitlines() if line.startswith('stage'))
  assert (tmp_path / 'schedule.png').read_bytes().startswith(b'\x89PNG')
  rows = [line.split() for line in table.splitlines() if line.split()[0] in '0123']
  assert [(row[0], row[1]) for row in rows] == [(stage, data) for stage in '0123' for data in '24']
  assert all(float(row[-2]) == pytest.approx(float(row[-1]), rel=0.01) for row in rows)
  assert (tmp_path / 'zero.png').read_bytes().startswith(b'\x89PNG')


def test_commands_for_clusters_name_what_is_there():
  commands = commands_of('docs/clusters.md', 'bash')
  named = {path for command in commands for path in re.findall(r'\b(?:tools|configs)/[\w/.]+\w', command)}
  assert named >= {'tools/launch/slurm.sbatch', 'tools/launch/jobset_tpu.yaml', 'tools/launch/tpu_vm.sh', 'configs/llama_1b.py'}
  assert all((ROOT / path).is_file() for path in named)
  linked = re.findall(r'\]\(\.\./(\S+?)\)', (ROOT / 'docs/clusters.md').read_text())
  assert linked and all((ROOT / path).is_file() for path in linked)


def test_recipes_of_the_page_are_those_of_the_folder():
  listed = set(re.findall(r'`(configs/\w+\.py)`', (ROOT / 'docs/recipes.md').read_text()))
  assert listed == {f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}


@pytest.mark.full
def test_commands_of_the_page_of_reports_run_as_written(tmp_path):
  run(commands_of('docs/reports.md'), tmp_path)
  one, both = ((tmp_path / name).read_text() for name in ('runs/narrow/report.html', 'runs/both.html'))
  assert 'bits per byte at step 30' in one and re.search(r'<td>started</td><td>20\d\d-', one)
  assert 'narrow is the best of 2 runs' in both and '<td>model.width</td><td>64</td><td>96</td>' in both


@pytest.mark.full
def test_commands_of_the_page_of_recipes_run_as_written(tmp_path):
  helped, config = run(commands_of('docs/recipes.md'), tmp_path).values()
  assert '--config.model.layers' in helped and 'model.layers = 12' in config


@pytest.mark.full
def test_commands_of_the_guide_to_faults_run_as_written(tmp_path):
  printed = list(run(commands_of('docs/faults.md'), tmp_path).values())
  assert len(printed) == 7
  steps = [json.loads(line)['step'] for line in (tmp_path / 'runs/faults/metrics.jsonl').read_text().splitlines()]
  assert sorted({*steps}) == [*range(1, 13)]
  assert printed[3].count('intact') == 3 and 'trained/tokens/table' in printed[4] and 'tensors bitwise equal' in printed[5]
  assert '2 logged steps repeated: bitwise equal' in printed[6]
