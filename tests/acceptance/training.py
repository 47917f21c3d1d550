"""Bars of training: from text to a scored model, the same on any mesh and after any stop, at the promised speed."""

import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gptjax import config as configs
from tests.acceptance.record import CLOCK, Result, bar, evaluate, given, timed, train


def shakespeare() -> str:
  """The flag that names Tiny Shakespeare."""
  return f'--config.data.source.path={given("tinyshakespeare/input.txt")}'


@bar
def make_train(folder: Path) -> Result:
  clone, home = folder / 'clone', folder / 'home'
  subprocess.run(['git', 'clone', '--quiet', '.', clone], check=True)
  home.mkdir()
  start = time.monotonic()
  subprocess.run(['make', 'train'], cwd=clone, env={**os.environ, 'HOME': str(home)}, check=True)
  seconds = time.monotonic() - start
  record = json.loads((clone / 'runs/default/evaluation.json').read_text())
  gzip, xz = (record['baselines'][f'{name} -9'] for name in ('gzip', 'xz'))
  return Result('fresh clone, empty cache: make train within 600 s, bits per byte below gzip -9',
                f'{seconds:.0f} s; {record["bits_per_byte"]:.3f} bits per byte (gzip -9 {gzip:.3f}, xz -9 {xz:.3f})',
                seconds <= 600 and record['bits_per_byte'] < gzip and (clone / 'runs/default/report.html').exists(), 'make train')


@bar
def make_test(folder: Path) -> Result:
  clone = folder / 'clone'
  subprocess.run(['git', 'clone', '--quiet', '.', clone], check=True)
  subprocess.run(['make', '--silent', '.venv/dev'], cwd=clone, check=True)
  quick, seconds, cpu = _tested(clone, 'test')
  subprocess.run(['make', '--silent', '.venv/parity'], cwd=clone, check=True)
  complete, _, all_cpu = _tested(clone, 'test-all')
  coverage = int(re.search(r'^TOTAL.*?(\d+)%', complete.stdout, re.MULTILINE)[1])
  counts = [line.strip('= ') for done in (quick, complete) for line in done.stdout.splitlines() if ' passed' in line]
  return Result('fresh clone, 2 cores: make test within 300 s and 560 CPU-seconds, make test-all within 1,500 CPU-seconds, coverage of '
                'gptjax/ at least 88 %', f'{seconds:.0f} s, {cpu:.0f} CPU-seconds; {all_cpu:.0f} CPU-seconds, {coverage} %; '
                + '; '.join(counts), quick.returncode == complete.returncode == 0 and seconds <= 300 and cpu <= 560 and all_cpu <= 1500
                and coverage >= 88, 'make test; make test-all')


def _tested(clone: Path, target: str) -> tuple[subprocess.CompletedProcess, float, float]:
  """The process, the seconds and the CPU-seconds of a target of make."""
  used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  start, before = time.monotonic(), used()
  done = subprocess.run(['make', target], cwd=clone, stdout=subprocess.PIPE, text=True)
  print(done.stdout)
  return done, time.monotonic() - start, used() - before


@bar
def shakespeare_char_cpu(folder: Path) -> Result:
  losses, seconds = [], []
  for seed in range(3):
    start = time.monotonic()
    train('shakespeare_char_cpu', folder / str(seed), shakespeare(), f'--config.seed={seed}')
    seconds.append(time.monotonic() - start)
    losses.append(evaluate(folder / str(seed))['loss'])
  mean = statistics.mean(losses)
  return Result("nanoGPT's CPU recipe, 3 seeds: mean at most 1.915 nats per character, each at most 1.925, at most 120 s each",
                f'{", ".join(f"{x:.4f}" for x in losses)}, mean {mean:.4f}; {", ".join(f"{x:.0f} s" for x in seconds)}',
                mean <= 1.915 and max(losses) <= 1.925 and max(seconds) <= 120,
                'python -m gptjax.train --config=configs/shakespeare_char_cpu.py --config.data.source.path=input.txt --config.seed=0')


@bar
def shakespeare_char_modern(folder: Path) -> Result:
  start = time.monotonic()
  train('shakespeare_char_modern', folder / 'run', shakespeare())
  seconds = time.monotonic() - start
  loss = evaluate(folder / 'run')['loss']
  facts = json.loads((folder / 'run/run.json').read_text())
  tokens = facts['tokens per step'] * 2000
  config = configs.from_json((folder / 'run/config.json').read_text())
  return Result('the modern recipe: at most 1.60 with 804,096 parameters, 1,536,000 tokens and 180 s',
                f'{loss:.4f}; {facts["parameters"]:,} parameters, {tokens:,} tokens, {seconds:.0f} s',
                loss <= 1.60 and facts['parameters'] <= 804_096 and seconds <= 180
                and int(config.steps) * config.batch_size * config.data.context <= 1_536_000,
                'python -m gptjax.train --config=configs/shakespeare_char_modern.py --config.data.source.path=input.txt')


@bar
def shakespeare_char(folder: Path) -> Result:
  lines = train('shakespeare_char', folder / 'run', shakespeare(), '--stop_at=20', '--log_every=1')
  losses = [line['loss'] for line in lines if 'loss' in line]
  return Result("nanoGPT's GPU recipe: 20 steps run on CPU (its bar of 1.48 needs a GPU)",
                f'{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}', len(losses) == 20 and losses[-1] < losses[0] - 0.5,
                'python -m gptjax.train --config=configs/shakespeare_char.py --config.data.source.path=input.txt --stop_at=20')


@bar
def counters(folder: Path) -> Result:
  from gptjax import model
  gpt2 = configs.ModelConfig(layers=12, width=768, heads=12, vocab_size=50257, vocab_multiple=1)
  with_bias = model.parameter_count(gpt2, 1024)
  without = model.parameter_count(dataclasses.replace(gpt2, bias=False), 1024)
  square = model.flops_per_token(gpt2, 1024, causal=False) * 1024
  causal = model.flops_per_token(gpt2, 1024) * 1024
  return Result('GPT-2 small at 1024: 124,439,808 parameters, 124,337,664 without biases, 874,944,921,600 FLOPs (full square)',
                f'{with_bias:,}; {without:,}; {square:,.0f} (causal {causal:,.0f})',
                (with_bias, without, square) == (124_439_808, 124_337_664, 874_944_921_600), 'python -m tests.acceptance --only=counters')


@bar
def resume(folder: Path) -> Result:
  args = (shakespeare(), '--config.steps=60', '--config.optimizer.warmup=20', '--config.eval.every=20', '--config.model.dropout=0.1',
          '--log_every=1')
  straight = train('shakespeare_char_cpu', folder / 'straight', *args)
  train('shakespeare_char_cpu', folder / 'resumed', *args, '--stop_at=30')
  resumed = train('shakespeare_char_cpu', folder / 'resumed', *args)
  strip = lambda lines: [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
  same = strip(straight) == strip(resumed)
  return Result('60 steps straight against --stop_at=30 and resume to 60: every field but the wall-clock ones bitwise equal',
                f'{len(straight)} lines against {len(resumed)}, {"equal" if same else "different"}', same and len(straight) >= 60,
                'python -m gptjax.train ... --stop_at=30, then without it')


@bar
def meshes(folder: Path) -> Result:
  worst = {}
  for optimizer in ('adamw', 'muon'):
    losses = {}
    for data, model, zero in ((1, 1, 0), (8, 1, 0), (8, 1, 3), (4, 2, 0), (4, 2, 3)):
      lines = train('shakespeare_char_cpu', folder / f'{optimizer}-{data}-{model}-{zero}', shakespeare(), '--stop_at=20',
                    '--log_every=1', f'--cpu_devices={data * model}', f'--config.mesh.data={data}', f'--config.mesh.model={model}',
                    f'--config.zero_stage={zero}', '--config.batch_size=16', '--config.model.dropout=0.1',
                    '--config.eval.every=0', f'--config.optimizer.name={optimizer}')
      losses[data, model, zero] = [line['loss'] for line in lines]
    reference = losses.pop((1, 1, 0))
    assert all(len(found) == len(reference) == 20 for found in losses.values())
    worst[optimizer] = max(abs(a / b - 1) for found in losses.values() for a, b in zip(found, reference))
  return Result('1 device against 8 (data 8; data 4 x model 2; ZeRO 0 and 3), dropout on: 20 losses within 1e-5 relative (Muon 1e-4)',
                f'AdamW {worst["adamw"]:.1e}, Muon {worst["muon"]:.1e}', worst['adamw'] <= 1e-5 and worst['muon'] <= 1e-4,
                'python -m gptjax.train ... --cpu_devices=8 --config.mesh.data=4 --config.mesh.model=2 --config.zero_stage=3')


@bar
def speed(folder: Path) -> Result:
  results = timed('large', 'medium', 'small')
  return Result("float32 step, torch's CPU-seconds over ours: at least 0.93 at 12 x 768, 1 at 6 x 384 and 4 x 128; below 1,000 page faults",
                ', '.join(f'{r["name"]} {r["ratio"]:.2f} ({r["lowest"]:.2f} to {r["highest"]:.2f}), {r["faults"]:,.0f} page faults'
                          for r in results), all(r['met'] for r in results), 'make bench')


@bar
def second_start(folder: Path) -> Result:
  command = [sys.executable, '-m', 'gptjax.train', '--config=configs/default.py', '--stop_at=1']
  subprocess.run([*command, f'--workdir={folder / "first"}'], check=True)
  metrics = folder / 'second/metrics.jsonl'
  start = time.monotonic()
  process = subprocess.Popen([*command, f'--workdir={folder / "second"}'])
  while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
    time.sleep(0.02)
  seconds = time.monotonic() - start
  assert process.wait() == 0
  return Result('second start of the default job, warm cache: first step within 10 s of the command', f'{seconds:.1f} s', seconds <= 10,
                'python -m gptjax.train --config=configs/default.py --workdir=NEW')
