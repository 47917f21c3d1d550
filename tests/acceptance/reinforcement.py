"""Bars of reinforcement: sums rewarded if they are right, preferences among a model's own answers, and kills of such runs."""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from tests.acceptance.disturbed import committed, figures, lost, same_run, start, step_told, until
from tests.acceptance.record import Result, bar, evaluate, given, python, train

SEEDS = range(3)
EXACT = ('--rewards=exact', '--max_tokens=5')
_SHUFFLED = '''
import numpy as np
from gptjax.training import rollouts
real, rng = rollouts.advantages, np.random.default_rng(0)
rollouts.advantages = lambda rewards, loss: rng.permutation(real(rewards, loss).reshape(-1)).reshape(rewards.shape)
from gptjax import train
train.script()
'''
"""gptjax.train with the advantages of all completions of a step shuffled."""


@bar
def grpo_addition(folder: Path) -> Result:
  _sums(folder)
  told, gains, passed, wrong = [], [], [], []
  for seed in SEEDS:
    before_cpu = _cpu_seconds()
    sft, flags = _half_learned(folder, seed)
    begun = _cpu_seconds()
    train('addition_grpo', folder / f'grpo{seed}', *flags)
    seconds = _cpu_seconds() - begun
    before = evaluate(sft[0], f'--step={sft[1]}', f'--sets=test={folder}/test.jsonl', *EXACT)
    after = evaluate(folder / f'grpo{seed}', f'--sets=test={folder}/test.jsonl')
    shuffled = folder / f'shuffled{seed}'
    subprocess.run([sys.executable, '-c', _SHUFFLED, '--config=configs/addition_grpo.py', f'--workdir={shuffled}', *flags,
                    '--config.eval.every=0'], check=True, env={**os.environ, 'PYTHONPATH': os.getcwd()})
    control = evaluate(shuffled, f'--sets=test={folder}/test.jsonl')
    figure = lambda name: f'{before[name]:.3f} -> {after[name]:.3f}'
    told.append(f'seed {seed}: SFT {sft[1]} steps in {begun - before_cpu:.0f} CPU s, GRPO in {seconds:.0f} CPU s, pass@1 '
                f'{figure("pass@1")}, greedy {figure("greedy")}, pass@8 {figure("pass@8")}, shuffled pass@1 {control["pass@1"]:.3f}')
    gains.append(after['pass@1'] - before['pass@1'])
    passed.append(after['greedy'] - before['greedy'] >= 0.05 and after['pass@8'] - before['pass@8'] >= -0.03 and seconds <= 120)
    wrong.append(control['pass@1'] - before['pass@1'])
  met = min(gains) >= 0.1 and statistics.mean(gains) >= 0.15 and all(passed) and max(wrong) < 0.01
  return Result('GRPO on sums, from SFT stopped at the first greedy accuracy of 50 % on validation, 200 steps of 32 prompts x 16, 3 seeds, '
                '2,500 sums of the test: pass@1 at least 10 points up on every seed and 15 on the mean, greedy 5 up, pass@8 at most 3 '
                'down, at most 120 CPU-seconds per run; with advantages shuffled no gain', '; '.join(told), met,
                'python -m gptjax.train --config=configs/addition_grpo.py ...; python -m gptjax.evaluate --sets=test=FILE')


@bar
def distilled_addition(folder: Path) -> Result:
  _sums(folder)
  told, gains, used = [], [], []
  for seed in SEEDS:
    (workdir, step), flags = _half_learned(folder, seed)
    train('addition_sft', workdir, flags[0], f'--config.seed={seed}')
    flags += [f'--config.objective.teacher={workdir}']
    begun = _cpu_seconds()
    train('addition_distilled', folder / f'own{seed}', *flags)
    used.append(_cpu_seconds() - begun)
    text = ['--config.objective.own_samples=false', '--config.objective.max_tokens=256', '--config.objective.loss=']
    train('addition_distilled', folder / f'text{seed}', *flags, *text)
    train('addition_distilled', folder / f'sft{seed}_on', *flags[:-1], *text, '--config.objective.kind=sft', '--config.objective.teacher=')
    test = [f'--sets=test={folder}/test.jsonl', *EXACT]
    start, teacher = evaluate(workdir, f'--step={step}', *test), evaluate(workdir, *test)
    own, text, sft = (evaluate(folder / name, *test) for name in (f'own{seed}', f'text{seed}', f'sft{seed}_on'))
    told.append(f'seed {seed}: pass@1 {start["pass@1"]:.3f} -> {own["pass@1"]:.3f} (teacher {teacher["pass@1"]:.3f}), pass@8 '
                f'{start["pass@8"]:.3f} -> {own["pass@8"]:.3f}, in {used[-1]:.0f} CPU s; on the answers of the data {text["pass@1"]:.3f}, '
                f'SFT on them {sft["pass@1"]:.3f}')
    gains.append(own['pass@1'] - start['pass@1'])
  return Result("distillation on the model's own answers, from the same starts, with the run after 700 steps for a teacher, 200 steps of "
                '128 answers, 3 seeds: pass@1 at least 20 points up on every seed, at most 120 CPU-seconds per run; forward KL and SFT on '
                'the answers of the data told beside it', '; '.join(told), min(gains) >= 0.2 and max(used) <= 120,
                'python -m gptjax.train --config=configs/addition_distilled.py ...; python -m gptjax.evaluate --sets=test=FILE')


@bar
def dpo_own_answers(folder: Path) -> Result:
  _sums(folder)
  (workdir, step), flags = _half_learned(folder, 0)
  _own_pairs(workdir, step, folder)
  source = json.dumps({'path': f'{folder}/test.jsonl', 'prompt': 'prompt', 'completion': 'completion'})
  python('tools.prepare_data', f'--source={source}', f'--tokenizer={workdir}/data/tokenizer', f'--out={folder}/store')
  test = f'--sets=test={folder}/store'  # runs on pairs read files of pairs
  exact = {'start': evaluate(workdir, f'--step={step}', test, *EXACT)}
  lines = {}
  for name, more in (('plain', []), ('with likelihood', ['--config.objective.chosen_weight=1'])):
    run = folder / name.replace(' ', '_')
    lines[name] = train('addition_grpo', run, *flags, '--config.objective.kind=preference', '--config.objective.rewards=[]',
                        '--config.objective.group=8', '--config.objective.max_tokens=256', '--config.objective.loss=dpo',
                        f'--config.data.source.path={folder}/pairs.jsonl', '--config.data.source.completion=',
                        '--config.data.source.chosen=chosen', '--config.data.source.rejected=rejected', '--config.data.context=32',
                        '--config.batch_size=64', '--config.optimizer.name=adamw', '--config.optimizer.peak_lr=3e-4', *more)
    exact[name] = evaluate(run, test, *EXACT)
  train('addition_grpo', folder / 'sft', *flags, '--config.objective.kind=sft', '--config.objective.rewards=[]',
        '--config.objective.group=8', '--config.objective.max_tokens=256', '--config.objective.loss=',
        f'--config.data.source.path={folder}/pairs.jsonl', '--config.data.source.completion=chosen', '--config.batch_size=64',
        '--config.optimizer.name=adamw', '--config.optimizer.peak_lr=3e-4')
  exact['SFT on the chosen'] = evaluate(folder / 'sft', test, *EXACT)
  valid = [line for line in lines['plain'] if 'eval/valid/margin' in line]
  first = next(line['loss'] for line in lines['plain'] if 'loss' in line)
  ends = {name: [line for line in found if 'eval/valid/margin' in line][-1] for name, found in lines.items()}
  told = [f'{name}: greedy {found["greedy"]:.3f}, pass@1 {found["pass@1"]:.3f}, pass@8 {found["pass@8"]:.3f}'
          for name, found in exact.items()]
  pairs = [f'{name}: margin {end["eval/valid/margin"]:.2f}, pair accuracy {end["eval/valid/accuracy"]:.2f}' for name, end in ends.items()]
  met = abs(first - 0.69314718) < 1e-6 and all(end['eval/valid/margin'] > 0 and end['eval/valid/accuracy'] > 0.6 for end in ends.values())
  return Result("DPO on pairs of a model's own right and wrong answers, with and without the chosen answer's likelihood: the first loss is "
                'ln 2 within 1e-6; margin and accuracy of held-out pairs go up; exact match told beside SFT on the chosen answers',
                f'first loss {first:.7f}; {"; ".join(pairs)} after {valid[-1]["step"]} steps; exact match on 2,500 sums: {"; ".join(told)}',
                met, 'python -m tests.acceptance --only=dpo_own_answers')


@bar
def killed_posttraining(folder: Path) -> Result:
  _sums(folder)
  (workdir, step), flags = _half_learned(folder, 0)
  more = ['--config.steps=40', '--config.checkpoint.every=10', '--config.eval.every=20', '--log_every=1']
  kinds = {'grpo': [*flags, *more, '--config=configs/addition_grpo.py', '--config.batch_size=128', '--config.objective.rollout_steps=2'],
           'lora': [*flags, *more, '--config=configs/addition_sft.py', '--config.lora.rank=4', '--config.optimizer.name=adamw']}
  told, wrong, dice = [], [], random.Random(0)
  for kind, given_flags in kinds.items():
    python('gptjax.train', *given_flags, f'--workdir={folder}/{kind}')
    runs, moments = [folder / f'{kind}-0'], list[int]()
    while len(moments) < 10:
      log, seen = folder / 'log', committed(runs[-1])
      process, after = start(runs[-1], given_flags, log), max(seen, default=0) + dice.randint(0, 12)
      alive = until(lambda: step_told(log) > after, process)
      process.kill()
      process.wait()
      if not alive:
        wrong += [f'{kind} ended with {process.returncode}: {log.read_text()[-300:]}'] if process.returncode else []
        runs.append(folder / f'{kind}-{len(runs)}')
        continue
      moments.append(step_told(log))
      wrong += [f'{kind}: checkpoint {one} was lost' for one in lost(runs[-1], seen)]
    python('gptjax.train', *given_flags, f'--workdir={runs[-1]}')
    wrong += [f'{run.name}: {text}' for run in runs if (text := same_run(folder / kind, run, given_flags, 40))]
    told.append(f'{kind}: killed at steps {", ".join(map(str, moments))} of {len(runs)} runs, {len(figures(runs[-1]))} lines of metrics')
  return Result('a GRPO run, with rollouts of two steps, and a run with adapters, each killed (-9) at 10 random moments: metrics and train '
                'state are bitwise those of an uninterrupted run',
                '; '.join(told) + ('; equal' if not wrong else f'; {"; ".join(wrong[:5])}'), not wrong,
                'kill -9 of python -m gptjax.train --config=RECIPE --workdir=DIR, and the same command again')


def _sums(folder: Path) -> None:
  python('examples.addition', f'--file={given("addition/addition.txt")}', f'--out={folder}')
  lines = (folder / 'valid.jsonl').read_text().splitlines()
  (folder / 'some.jsonl').write_text('\n'.join(lines[:1000]) + '\n')


def _half_learned(folder: Path, seed: int) -> tuple[tuple[Path, int], list[str]]:
  """The workdir and the first step at which half of 1,000 validation sums are right, and the flags of runs that start there."""
  workdir, source = folder / f'sft{seed}', f'--config.data.source.path={folder}/train.jsonl'
  step = 0
  for last in range(200, 701, 100):
    train('addition_sft', workdir, source, f'--config.seed={seed}', f'--stop_at={last}')
    some = ','.join(str(one) for one in range(last - 80 if last > 200 else 100, last + 1, 20))
    python('gptjax.evaluate', f'--workdir={workdir}', f'--sets=some={folder}/some.jsonl', *EXACT, '--completions=1', f'--step={some}')
    found = [json.loads(line) for line in (workdir / 'evaluations.jsonl').read_text().splitlines()]
    if step := next((one['step'] for one in found if one['greedy'] >= 0.5), 0):
      break
  return (workdir, step), [source, f'--config.init_from={workdir}/checkpoints/{step}', f'--config.seed={seed}',
                           f'--config.data.tokenizer.path={workdir}/data/tokenizer']


def _own_pairs(workdir: Path, step: int, folder: Path) -> None:
  """A right and a wrong answer that the model drew for each of 3,000 sums to train on, where it drew both."""
  prompts = [json.loads(line) for line in (folder / 'train.jsonl').read_text().splitlines()[:3000]]
  (folder / 'prompts.jsonl').write_text('\n'.join(json.dumps({'prompt': one['prompt']}) for one in prompts))
  pairs: dict[int, dict[bool, str]] = {}
  for seed in range(8):
    python('gptjax.generate', f'--workdir={workdir}', f'--step={step}', f'--prompts={folder}/prompts.jsonl', '--max_tokens=5',
           '--temperature=1', f'--seed={seed * len(prompts)}', f'--out={folder}/drawn.jsonl')
    for number, line in enumerate((folder / 'drawn.jsonl').read_text().splitlines()):
      text = json.loads(line)['text']
      pairs.setdefault(number, {})[text == prompts[number]['completion']] = text
  both = [{'prompt': prompts[number]['prompt'], 'chosen': found[True], 'rejected': found[False]} for number, found in pairs.items()
          if len(found) == 2 and found[False].strip()]
  (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, both)) + '\n')


def _cpu_seconds() -> float:
  """Of the commands that have ended."""
  return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
