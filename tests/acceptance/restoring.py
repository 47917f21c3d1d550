"""Bars of checkpoints: they are restored on any mesh, corruption is detected, and a full disk loses none."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.acceptance.disturbed import committed, figures, recipe, same_run, start, until, whole
from tests.acceptance.kept_state import kept, same
from tests.acceptance.record import Result, bar, python, several

_CORRUPTIONS = 40

# Devices, the mesh's data and model axes, stage, processes.
_SOURCES = {'1 device': (1, 1, 1, 0, 1), '8x1 stage 3': (8, 8, 1, 3, 1), '2 processes, 2x4 stage 2': (8, 2, 4, 2, 2)}
_TARGETS = [(1, 1, 1, 0, 1), (2, 2, 1, 3, 1), (4, 4, 1, 1, 1), *((8, 8, 1, stage, 1) for stage in range(4)),
            *((8, 2, 4, stage, 1) for stage in range(4)), (8, 8, 1, 0, 2), (8, 8, 1, 3, 2), (8, 2, 4, 1, 2), (8, 2, 4, 2, 2)]


@bar
def restores(folder: Path) -> Result:
  flags = recipe(folder, '--config.model.layers=2', '--config.model.width=64', '--config.model.heads=8', '--config.model.kv_heads=2',
                 '--config.model.mlp_width=171', '--config.model.positions=rope', '--config.model.norm=rmsnorm',
                 '--config.model.mlp=swiglu', '--config.batch_size=16', '--config.eval.every=0', '--config.mesh.max_unsharded=1',
                 '--stop_at=20')
  worst, wrong, arrays, rows = 0.0, [], 0, 0
  for name, how in _SOURCES.items():
    source = folder / name.replace(' ', '-')
    _train(source, flags, *how)
    saved, losses, fed = kept(source, 'saved-10', how[-1]), _losses(source), _rows(source, 10)
    arrays, rows = len(saved), rows + len(_TARGETS) * len(fed)
    for target in _TARGETS:
      workdir = folder / 'target'
      shutil.copytree(source, workdir, ignore=shutil.ignore_patterns('*.npz', 'rows.*', '20'))
      _train(workdir, flags, *target)
      off = max(abs(a / b - 1) for a, b in zip(_losses(workdir), losses, strict=True))
      worst = max(worst, off)
      state, feed = same(kept(workdir, 'restored-10', target[-1]), saved), _rows(workdir, 0) == fed
      print(f'{name} on {target}: losses {off:.1e}, state {state}, rows {feed}', file=sys.stderr)
      if off > 1e-5 or not state or not feed:
        wrong.append(f'{name} on {target}: losses {off:.1e}, state {state}, rows {feed}')
      shutil.rmtree(workdir)
  count = len(_SOURCES) * len(_TARGETS)
  return Result('checkpoints of 1 device, of 8x1 at ZeRO 3 and of 2 processes (2x4, ZeRO 2), 8 heads, 2 key heads, dropout: restored on 1, '
                '2, 4 and 8 devices, meshes 8x1 and 2x4 at ZeRO 0 to 3, 1 and 2 processes: parameters and optimizer state bitwise, the '
                'next 10 losses within 1e-5 of the uninterrupted run, global rows bitwise',
                f'{count - len(wrong)} of {count} restores: {arrays} arrays equal bit by bit each, losses off by {worst:.1e} at most, '
                f'{rows:,} rows equal' + ''.join(f'; wrong: {one}' for one in wrong), not wrong and arrays > 30 and rows > 0,
                'python -m gptjax.train --workdir=DIR ..., again with another --cpu_devices, --config.mesh.* and --config.zero_stage')


def _train(workdir: Path, flags: list[str], devices: int, data: int, model: int, stage: int, processes: int) -> None:
  args = ['tests.acceptance.kept_state', *flags, f'--workdir={workdir}', f'--config.mesh.data={data}', f'--config.mesh.model={model}',
          f'--config.zero_stage={stage}']
  if processes == 1:
    python(*args, f'--cpu_devices={devices}')
  else:
    several(processes, devices // processes, *args)


def _losses(workdir: Path) -> list[float]:
  return [line['loss'] for line in figures(workdir) if 10 < line['step'] <= 20]


def _rows(workdir: Path, first: int) -> set[tuple[int, str, str]]:
  """The rows of ten batches, of all processes; their numbers count from the first of these."""
  found = set()
  for file in workdir.glob('rows.*'):
    for line in file.read_text().splitlines():
      batch, row, digest = line.split()
      if first <= int(batch) < first + 10:
        found.add((int(batch) - first, row, digest))
  return found


@bar
def corruptions(folder: Path) -> Result:
  flags, dice = recipe(folder), random.Random(0)
  python('tests.acceptance.kept_state', *flags, f'--workdir={folder}/straight', '--stop_at=30')
  python('gptjax.train', *flags, f'--workdir={folder}/base', '--stop_at=20')
  done, outcomes, wrong = Counter(), Counter(), []
  for number in range(_CORRUPTIONS):
    workdir = folder / 'damaged'
    shutil.copytree(folder / 'base', workdir)
    kind, name = _corrupt(workdir / 'checkpoints/20', dice)
    outcome = _after_corruption(workdir, folder / 'straight', flags, folder / 'log')
    print(f'{number + 1}: {kind} {name}: {outcome}', file=sys.stderr)
    done[kind] += 1
    outcomes[outcome] += 1
    if outcome not in ('found', 'restored exactly'):
      wrong.append(f'{kind} {name}: {outcome}')
    shutil.rmtree(workdir)
  files = sum(path.is_file() for path in (folder / 'base/checkpoints/20').rglob('*'))
  return Result(f'{_CORRUPTIONS} random corruptions of a random file of the newest checkpoint: each is detected and reported, the '
                'checkpoint is moved to WORKDIR/damaged and the previous one used, or it is restored exactly; metrics and train state 10 '
                'steps later are bitwise those of an uninterrupted run; never a traceback',
                f'{", ".join(f"{name} {count}" for name, count in done.items())}, of {files} files; '
                + ', '.join(f'{name} {count}' for name, count in outcomes.items()) + ''.join(f'; wrong: {one}' for one in wrong[:5]),
                not wrong, 'a corrupted file in DIR/checkpoints/STEP, then python -m gptjax.train --workdir=DIR ...')


def _corrupt(checkpoint: Path, dice: random.Random) -> tuple[str, Path]:
  """Corrupts a random file in a random way; returns the way and the file."""
  file = dice.choice(sorted(path for path in checkpoint.rglob('*') if path.is_file()))
  size = file.stat().st_size
  kind = dice.choice(['truncated', 'a bit flipped', 'removed', 'emptied'] if size else ['removed'])
  match kind:
    case 'truncated':
      os.truncate(file, dice.randrange(size))
    case 'emptied':
      os.truncate(file, 0)
    case 'removed':
      file.unlink()
    case _:
      content = bytearray(file.read_bytes())
      content[dice.randrange(size)] ^= 1 << dice.randrange(8)
      file.write_bytes(content)
  return kind, file.relative_to(checkpoint)


def _after_corruption(workdir: Path, straight: Path, flags: list[str], log: Path) -> str:
  """The outcome of the same command for a run whose checkpoint 20 is corrupted."""
  status = start(workdir, [*flags, '--stop_at=30'], log, 'tests.acceptance.kept_state').wait()
  said, aside = log.read_text(), [*(workdir / 'damaged').glob('20-*')]
  if status or 'Traceback' in said:
    return f'status {status}: {said[-300:]}'
  if figures(workdir) != figures(straight) or not same(kept(workdir, 'saved-30', 1), kept(straight, 'saved-30', 1)):
    return 'a wrong number'
  found = re.search(r'checkpoint 20 is damaged: .*moved to', said) is not None
  step = 10 if found else 20
  exact = (workdir / f'restored-{step}.0.npz').exists() and same(kept(workdir, f'restored-{step}', 1), kept(straight, f'saved-{step}', 1))
  if not exact or found != (len(aside) == 1):
    return f'restored {"" if exact else "not "}as saved at {step}, put aside {len(aside)}'
  return 'found' if found else 'restored exactly'


@bar
def disk_full(folder: Path) -> Result:
  flags = recipe(folder, '--config.model.layers=8', '--config.model.heads=8', '--config.model.width=576', '--config.batch_size=2',
                 '--config.data.context=32', '--config.eval.every=0', steps=40)
  python('gptjax.train', *flags, f'--workdir={folder}/straight')
  size = sum(path.stat().st_size for path in (folder / 'straight/checkpoints/40').rglob('*') if path.is_file())
  said, wrong = [], []
  for freed in (True, False):
    with _small_disk(folder / 'disk', 2**31) as disk:
      status, log, kept_steps, failures = _on_full_disk(disk, flags, folder / 'log', freed)
      errors = [line for line in log.splitlines() if line.startswith('error: ')]
      said.append(f'space {"made later" if freed else "never made"}: {failures} saves failed, status {status}, '
                  f'checkpoints {kept_steps} whole' + (f', {errors[0].replace(f"{folder}/", "")[:90]!r}' if errors else ''))
      if not failures or 'Traceback' in log or not kept_steps or committed(disk / 'run') != kept_steps:
        wrong.append(f'{said[-1]}; there are {committed(disk / "run")}: {log[-400:]}')
      if status != (0 if freed else 2) or len(errors) != (0 if freed else 1):
        wrong.append(f'status {status}, {errors}')
      if not freed:
        python('gptjax.train', *flags, f'--workdir={disk}/run')
      if text := same_run(folder / 'straight', disk / 'run', flags, 40):
        wrong.append(text)
  return Result('a disk of 2 GB that is full while a checkpoint is written: if space is freed later, the run continues to its end; '
                'if not, it ends with one error line and status 2, and the same command resumes once there is space; all committed '
                'checkpoints are intact; metrics and train state are bitwise those of an uninterrupted run',
                f'checkpoints of {size / 1e6:.0f} MB; {"; ".join(said)}; ' + ('all equal' if not wrong else '; '.join(wrong)), not wrong,
                'python -m gptjax.train --config=RECIPE --workdir=SMALL_DISK/run')


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Path]:
  folder.mkdir(exist_ok=True)
  subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], check=True)
  try:
    yield folder
  finally:
    subprocess.run(['umount', '--lazy', folder], check=True)


def _on_full_disk(disk: Path, flags: list[str], log: Path, freed: bool) -> tuple[int, str, list[int], int]:
  """Fills the disk when the second save begins; returns status, stderr, whole checkpoints and how many saves failed."""
  workdir, filler, over = disk / 'run', disk / 'filler', threading.Event()
  process = start(workdir, flags, log)
  failures = lambda: log.read_text().count('not saved: ')
  assert until(lambda: committed(workdir) and [*(workdir / 'checkpoints').glob('*.saving*')], process), log.read_text()
  thread = threading.Thread(target=_fill, args=(filler, over))
  thread.start()
  try:
    if freed and until(failures, process):
      time.sleep(10)
    if not freed:
      process.wait()
  finally:
    over.set()
    thread.join()
  found = whole(workdir)  # while it is full
  filler.unlink()
  status = process.wait()
  return status, log.read_text(), found if not freed else whole(workdir), failures()


def _fill(file: Path, over: threading.Event) -> None:
  """Takes all space, and what is given back of it, until it is over."""
  with file.open('wb', buffering=0) as out:
    size = 2**24
    while not over.is_set():
      try:
        out.write(bytes(size))
      except OSError:
        size = max(size // 2, 4096)
        time.sleep(0.001)


@bar
def save_cost(folder: Path) -> Result:
  flags = recipe(folder, '--config.model.layers=14', '--config.model.heads=12', '--config.model.width=768', '--config.batch_size=1',
                 '--config.data.context=128', '--config.eval.every=0', steps=1000)
  found = json.loads(python('tests.acceptance.saving', *flags, f'--workdir={folder}/run').stdout)
  unsaved = json.loads(python('tests.acceptance.saving', *flags, f'--workdir={folder}/unsaved', '--every=10', '--saves=0').stdout)
  seconds = {kind: [one['seconds'] for one in found[kind]] for kind in ('without', 'with')}
  cost = sum(seconds['with']) / sum(seconds['without']) - 1
  by_steps = sum(found['more']) / len(seconds['with']) / (sum(seconds['without']) / len(seconds['without']))
  state = found['state']
  # Memory for saving is taken before the first one, and stays: a run that never saves shows what saves add during training.
  beside = [(max(one['memory'][which] for one in found['with']) - unsaved['without'][0]['memory'][which]) / state for which in (0, 1)]
  alone = [(after - before) / state for before, after in zip(found['before'], found['alone'])]
  listed = lambda times: ', '.join(f'{one:.1f}' for one in times)
  return Result('99M parameters, 128 tokens per step, a save every 50: saves take less than 3 % of the time, measured by stretches of '
                'steps with and without one, and by steps during and without a write; memory that a save adds: at most 0.3 times the '
                'state while training waits, 1.2 times during training',
                f'{cost:+.1%} of the time by stretches ({listed(seconds["with"])} s with, {listed(seconds["without"])} s without), '
                f'{by_steps:+.1%} by steps ({listed(found["more"])} s more); the run waits for {listed(found["calls"])} s of them; a save '
                f'alone {found["whole_save"]:.1f} s; state {state / 1e9:.2f} GB; added alone {alone[0]:.2f}, beside training '
                f'{beside[0]:.2f} times that (with pages of files {alone[1]:.2f} and {beside[1]:.2f})',
                max(cost, by_steps) < 0.03 and alone[0] <= 0.3 and beside[0] <= 1.2 and len(seconds['with']) >= 3,
                'python -m tests.acceptance --only=save_cost')
