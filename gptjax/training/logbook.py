"""Where a run writes what happens: metrics.jsonl, TensorBoard, samples.jsonl and the terminal."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from gptjax.files import json_line, write_whole


class Logbook:
  """The records of a run in its workdir; lines after `step` left by an earlier process are cut off.

  Args:
    workdir: of the run.
    step: updates done so far.
    steps: updates in all.
  """

  def __init__(self, workdir: Path, step: int, steps: int):
    self.console = Console(stderr=True, highlight=False, soft_wrap=True)
    self._files = {name: _cut(workdir / name, step).open('a') for name in ('metrics.jsonl', 'samples.jsonl')}
    self._board = _Board(workdir / 'tensorboard', step + 1)
    self._steps = steps
    self._bar = Progress(
      TextColumn('[bold]step'), MofNCompleteColumn(), BarColumn(), TextColumn('{task.fields[figures]}'), TimeRemainingColumn(),
      console=self.console, disable=not self.console.is_terminal)
    self._task = self._bar.add_task('train', total=steps, completed=step, figures='')
    self._started = time.monotonic()
    self._first = step
    self._bar.start()

  def header(self, facts: dict[str, Any]) -> None:
    """Prints what this run is, a line a fact."""
    width = max(map(len, facts))
    for name, value in facts.items():
      self.console.print(f'{name:>{width}}  {value}', markup=False)

  def step(self, step: int, metrics: dict[str, float]) -> None:
    """Records the metrics of a training step."""
    self._write('metrics.jsonl', {'step': step, **metrics})
    self._board.scalars(step, {f'train/{name}': value for name, value in metrics.items()})
    figures = f'loss {metrics["loss"]:.4f}  {metrics["tokens_per_second"]:,.0f} tokens/s  MFU {metrics["mfu"]:.1%}'
    self._bar.update(self._task, figures=figures)
    if not self.console.is_terminal:
      left = (self._steps - step) * (time.monotonic() - self._started) / max(step - self._first, 1)
      self.console.print(f'step {step}/{self._steps}  {figures}  {_clock(left)} left', markup=False)

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    self._bar.update(self._task, completed=step)

  def validation(self, step: int, scores: dict[str, Any]) -> None:
    """Records the Score of each validation set, by name."""
    metrics: dict[str, float] = {}
    for name, score in scores.items():
      figures = {'loss': score.loss, 'perplexity': score.perplexity, 'bits_per_byte': score.bits_per_byte}
      metrics |= {f'eval/{name}/{figure}': value for figure, value in figures.items()}
      self.console.print(f'step {step}  {name}: ' + '  '.join(f'{figure} {value:.4f}' for figure, value in figures.items()),
                         markup=False)
    self._write('metrics.jsonl', {'step': step, **metrics})
    self._board.scalars(step, metrics)
    self._board.flush()

  def sample(self, step: int, prompt: str, text: str) -> None:
    """Records a sample."""
    self._write('samples.jsonl', {'step': step, 'prompt': prompt, 'text': text})
    self._board.text(step, 'sample', prompt + text)
    self.console.print(f'step {step}  sample: {prompt + text}', markup=False)

  def say(self, line: str) -> None:
    """Prints a line above the progress bar."""
    self.console.print(line, markup=False)

  def close(self) -> None:
    """Flushes everything; the bar leaves the terminal as it found it."""
    self._bar.stop()
    with contextlib.ExitStack() as stack:  # each, even where another finds the disk full
      for close in (self._board.close, *(file.close for file in self._files.values())):
        stack.callback(close)

  def _write(self, name: str, record: dict[str, Any]) -> None:
    self._files[name].write(json_line(record) + '\n')
    self._files[name].flush()


class Silence(Logbook):
  """The Logbook of the processes that another one writes for."""

  def __init__(self) -> None:
    pass

  def _nothing(self, *args: Any, **named: Any) -> None:
    pass

  header = step = advance = validation = sample = say = close = _nothing


class _Board:
  """TensorBoard's file, written as the figures come: tensorboardX's own thread dies on a full disk, and the run then hangs.

  Args:
    folder: made if missing.
    first: step from which on TensorBoard shall forget what earlier processes wrote.
  """

  def __init__(self, folder: Path, first: int):
    folder.mkdir(parents=True, exist_ok=True)
    self._file = RecordWriter(str(folder / f'events.out.tfevents.{time.time():.6f}'))
    self.flush, self.close = self._file.flush, self._file.close
    self._add(0, file_version='brain.Event:2')
    self._add(first, session_log=SessionLog(status=SessionLog.START))

  def scalars(self, step: int, figures: dict[str, float]) -> None:
    self._add(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]))

  def text(self, step: int, name: str, text: str) -> None:
    indented = f'    {text}'.replace('\n', '\n    ')  # Markdown's way to leave it as it is
    self._add(step, summary=summary.text(name, indented))

  def _add(self, step: int, **content: Any) -> None:
    self._file.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())


def _cut(path: Path, step: int) -> Path:
  """Drops the lines of a JSONL file that are of a later step, or that a killed process left unfinished."""
  if path.exists():
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith('\n')]
    kept = ''.join(line for line in lines if json.loads(line)['step'] <= step)
    write_whole(path, kept)
  return path


def _clock(seconds: float) -> str:
  return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}'
