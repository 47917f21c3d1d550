"""The records of a run: metrics.jsonl, samples.jsonl, TensorBoard and the terminal."""

import datetime
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gptjax.data.progress import announce
from gptjax.files import Lines, complete_lines, json_line, write_atomic

# tensorboardX imports these where they are installed, which takes seconds; scalars and text need none of them.
_unneeded = {'torch', 'google.cloud.storage', 'boto3'} - sys.modules.keys()
sys.modules.update(dict.fromkeys(_unneeded))  # type: ignore[arg-type]  # None: an import of it fails
from tensorboardX import summary  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # noqa: E402
from tensorboardX.record_writer import RecordWriter  # noqa: E402
for _name in _unneeded:
  del sys.modules[_name]


_FIGURES = {'loss': 'loss {:.4f}', 'tokens_per_second': '{:,.0f} tokens/s', 'mfu': 'MFU {:.1%}'}
"""The metrics that a step's line on the terminal has, where they are known."""


class _Console(Console):
  """Training continues if the reader of the output, such as a terminal or tee, is gone."""

  def on_broken_pipe(self) -> None:
    self.quiet = True


class Logbook:
  """Writes the records of a run in its workdir, after `step` of `steps` updates; lines of later steps are removed."""

  def __init__(self, workdir: Path, step: int, steps: int):
    self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
    self._workdir = workdir
    self._files = {name: Lines(_cut(workdir / name, step)) for name in ('metrics.jsonl', 'samples.jsonl')}
    self._board = _Board(workdir / 'tensorboard', step + 1)
    self._steps = steps
    self._bar = Progress(TextColumn('[bold]step'), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), console=self.console,
                         disable=not self.console.is_terminal)
    self._task = self._bar.add_task('train', total=steps, completed=step)
    self._first: tuple[float, int] | None = None  # seconds and step of the first logged step, from which the time left is estimated
    self._bar.start()

  def header(self, facts: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Prints the facts of a run, one per line; TensorBoard gets the fields of its config as hyperparameters."""
    self._board.hyperparameters(fields)
    width = max(map(len, facts))
    for name, value in facts.items():
      self.say(f'{name:>{width}}  {value}')

  def step(self, step: int, metrics: dict[str, Any]) -> None:
    """Records the metrics of a training step; TensorBoard gets those that are numbers, not the lists."""
    self._write('metrics.jsonl', {'step': step, **metrics})
    self._board.scalars(step, {f'train/{name}': value for name, value in metrics.items() if not isinstance(value, list)})
    words = [f'step {step}/{self._steps}', *(form.format(metrics[name]) for name, form in _FIGURES.items() if name in metrics)]
    seconds, first = self._first = self._first or (time.monotonic(), step)
    if step > first:
      left = (self._steps - step) * (time.monotonic() - seconds) / (step - first)
      words.append(f'{datetime.timedelta(seconds=int(left))} left')
    self.say('  '.join(words))

  def rewind(self, step: int) -> None:
    """Removes the records after a step, from which the run continues."""
    self._board.close()
    for name in self._files:
      self._files[name] = Lines(_cut(self._workdir / name, step))
    self._board = _Board(self._workdir / 'tensorboard', step + 1)
    self._first = None
    self.advance(step)

  def flush(self) -> None:
    """Returns when every line is on the disk; raises a UserError if they cannot be written, and stay in memory."""
    for file in self._files.values():
      file.flush()

  def advance(self, step: int) -> None:
    """Updates the progress bar."""
    self._bar.update(self._task, completed=step)

  def validation(self, step: int, scores: dict[str, Any]) -> None:
    """Records the Score of each validation set, by name."""
    metrics: dict[str, float] = {}
    for name, score in scores.items():
      figures = score.logged
      metrics |= {f'eval/{name}/{figure}': value for figure, value in figures.items()}
      self.say(f'step {step}  {name}: ' + '  '.join(f'{figure} {value:.4f}' for figure, value in figures.items()))
    self._write('metrics.jsonl', {'step': step, **metrics})
    self._board.scalars(step, metrics)

  def sample(self, step: int, prompt: str, text: str) -> None:
    """Records a sample."""
    self._write('samples.jsonl', {'step': step, 'prompt': prompt, 'text': text})
    self._board.text(step, 'sample', prompt + text)
    self.say(f'step {step}  sample: {prompt + text}')

  def say(self, line: str) -> None:
    """Prints a line above the progress bar."""
    self.console.print(line, markup=False)

  def close(self) -> None:
    """Closes the files and restores the terminal."""
    self._bar.stop()
    self._board.close()

  def _write(self, name: str, record: dict[str, Any]) -> None:
    file = self._files[name]
    waited = file.waiting
    if (error := file.write(json_line(record) + '\n')) and not waited:
      self.say(f'{self._workdir / name}: {error}; its lines stay in memory')


class NullLogbook(Logbook):
  """The Logbook of all processes but process 0, which writes for all."""

  def __init__(self) -> None:
    pass

  def _nothing(self, *args: Any, **named: Any) -> None:
    pass

  header = step = rewind = flush = advance = validation = sample = say = close = _nothing


class _Board:
  """TensorBoard's event file, written synchronously: the thread of tensorboardX's writer dies on a full disk, and the run then hangs.

  A record that cannot be written ends the file, up to which TensorBoard reads; metrics.jsonl is complete. From step `first` on TensorBoard
  discards records of earlier processes.
  """

  def __init__(self, folder: Path, first: int):
    folder.mkdir(parents=True, exist_ok=True)
    self._file: RecordWriter | None = RecordWriter(str(folder / f'events.out.tfevents.{time.time():.6f}'))
    self._add(0, file_version='brain.Event:2')
    self._add(first, session_log=SessionLog(status=SessionLog.START))

  def scalars(self, step: int, figures: dict[str, float]) -> None:
    self._add(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]))

  def hyperparameters(self, fields: Mapping[str, Any]) -> None:
    plain = lambda value: value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=vars)
    known = {name: plain(value) for name, value in fields.items()}
    for part in summary.hparams(known, {'train/loss': None})[:2]:  # without the end of the run, which is not known yet
      self._add(0, summary=part)

  def text(self, step: int, name: str, text: str) -> None:
    indented = f'    {text}'.replace('\n', '\n    ')  # a code block in Markdown
    self._add(step, summary=summary.text(name, indented))

  def _add(self, step: int, **content: Any) -> None:
    if self._file is None:
      return
    try:
      self._file.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())
      self._file.flush()
    except OSError as error:
      self._file = None
      announce(f'tensorboard: {error.strerror}; this process no longer writes it')

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def _cut(path: Path, step: int) -> Path:
  """Removes the lines of a JSONL file that are of later steps or incomplete."""
  kept = []
  for number, line in enumerate(complete_lines(path), 1):
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line)
    except (ValueError, LookupError, TypeError):
      announce(f'{path}:{number} is damaged and removed: {line.strip()[:60]!r}')
  if path.exists():
    write_atomic(path, ''.join(kept))
  return path
