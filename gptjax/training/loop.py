"""The training loop: one compiled step, dispatched before the metrics of the step before are read."""

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress
from gptjax.config import Config, UserError, in_unit_of_steps
from gptjax.data import Prepared, batches, cores, export, prepare
from gptjax.evaluation import Scorer
from gptjax.files import write_whole
from gptjax.inference import Generator
from gptjax.model import flops_per_token
from gptjax.processes import company, first, share
from gptjax.sharding import make_mesh, my_rows, place_rows
from gptjax.training.hardware import CompileCounter, peak_flops
from gptjax.training.logbook import Logbook, Silence
from gptjax.training.run import Run, header, resolve
from gptjax.training.step import TrainState

MAY_CHANGE = ('steps', 'batch_size', 'microbatches', 'zero_stage', 'z_loss', 'mesh.', 'eval.', 'checkpoint.', 'optimizer.',
              'model.attention', 'model.remat', 'model.saved', 'model.offloaded', 'model.sequence_parallel', 'model.dropout',
              'model.compute_dtype', 'data.source.path', 'data.source.skip',
              'data.tokenizer.path', 'data.prefetch', 'data.workers')
"""Fields a resumed run may change; others would make its checkpoint or its place in the data meaningless."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What of a run is not its config: where things lie, and what is shown."""

  workdir: Path
  cache_dir: Path
  log_every: int = 10
  """steps between logged lines"""
  stop_at: int = 0
  """step after which this process saves and ends; 0: the last"""
  profile_steps: tuple[int, int] | None = None
  """first and last step of a profiler trace"""


def train(config: Config, options: Options) -> None:
  """Trains, or goes on where the workdir's latest checkpoint stands."""
  data = _prepare(config, options.cache_dir)
  mesh = make_mesh(config.mesh)
  assert jax.process_count() == company().group.processes, 'processes of one run join through gptjax.start'
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    run = resolve(config, data, mesh)
    changed = _claim(options.workdir, run.config, data) if first() else []
    _see(options.workdir)
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(options.workdir / 'checkpoints', config.checkpoint)))
    newest = share('newest checkpoint', max(checkpoints.steps(), default=None))
    if newest is not None:
      state, progress = checkpoints.restore(newest, run.abstract_state)
    else:
      state, progress = run.initialize(), Progress()
    last = min(run.steps, options.stop_at or run.steps)
    _check_profile(options.profile_steps, progress.step, last)
    _check_rows(run, progress, last)
    peak = peak_flops(list(mesh.devices.flatten()), run.config.model.compute_dtype)
    book = stack.enter_context(contextlib.closing(
      Logbook(options.workdir, progress.step, run.steps) if first() else Silence()))
    facts = header(run, data, progress, peak)
    book.header(facts | ({'changed': '; '.join(changed)} if changed else {}))
    if progress.step >= last:
      book.say(f'nothing to do: step {progress.step} of {last} is done')
      return
    if first():
      write_whole(options.workdir / 'run.json', json.dumps(facts, indent=2) + '\n')
    _Loop(run, data, checkpoints, book, options, peak[0]).go(state, progress, last)


def _prepare(config: Config, cache_dir: Path) -> Prepared:
  """The data: process 0 makes it first, so that the others find it in a cache they share, or make it on a disk of their own."""
  data = prepare(config.data, cache_dir, cores()) if first() else None
  fingerprint = share('data', data and data.fingerprint)
  data = data or prepare(config.data, cache_dir, cores())
  if data.fingerprint != fingerprint:
    raise UserError('data', data.fingerprint, f'{fingerprint}, the fingerprint of documents, split and tokenizer in process 0')
  return data


def _see(workdir: Path) -> None:
  """Waits until every process sees the workdir as process 0 left it."""
  share('workdir')
  deadline = time.monotonic() + 60  # network file systems may remember for so long that a file was not there
  while not (workdir / 'config.json').exists():
    if time.monotonic() > deadline:
      raise UserError('--workdir', str(workdir), 'a folder of a file system that all processes share; process 0 wrote what is not here')
    time.sleep(0.1)


def _claim(workdir: Path, config: Config, data: Prepared) -> list[str]:
  """Makes the workdir self-contained, or checks that it is of this run; returns what changed since it started."""
  file = workdir / 'config.json'
  different = configs.differences(configs.from_json(file.read_text(), str(file)), config) if file.exists() else {}
  vocabulary = different.pop('model.vocab_size', None)
  _check_mixture(different, config)
  for name, (was, now) in different.items():
    if not name.startswith(MAY_CHANGE) or name == 'optimizer.name':
      raise _another_run(name, was, now)
  export(data, workdir / 'data')
  if vocabulary:  # last, because it follows from tokenizer and text, and their errors say more
    raise _another_run('model.vocab_size', *vocabulary)
  write_whole(file, configs.to_json(config))
  return [f'{name} {was} -> {now}' for name, (was, now) in different.items()]


def _check_mixture(different: dict[str, tuple], config: Config) -> None:
  """Takes stores that only moved out of what is different; their content is in the fingerprint of the data."""
  for name in ('data.train', 'data.valid'):
    was, now = different.get(name, ((), ()))
    if name in different and [dataclasses.replace(one, store='') for one in was] == [dataclasses.replace(one, store='') for one in now]:
      del different[name]
  if 'batch_size' in different and any(in_unit_of_steps(phase.start) for phase in config.data.phases):
    raise UserError('batch_size', config.batch_size, f'{different["batch_size"][0]}, with which this workdir was started, where '
                    "data.phases start at steps; phases that start at '1e9 tokens' do not depend on it")


def _another_run(name: str, was: object, now: object) -> UserError:
  return UserError(name, now, f'{was!r}, with which this workdir was started; another --workdir for another run')


def _check_profile(steps: tuple[int, int] | None, done: int, last: int) -> None:
  if steps and not done < steps[0] <= last:
    accepted = f'a first step from {done + 1} to {last}, which this process runs' if done < last else f'no trace: step {done} is done'
    raise UserError('--profile_steps', f'{steps[0]}:{steps[1]}', accepted)


def _check_rows(run: Run, done: Progress, last: int) -> None:
  rows, size = run.rows.mixture.rows, run.config.batch_size
  if rows is not None and done.rows + (last - done.step) * size > rows:
    raise UserError('steps', last, f'at most {done.step + max(rows - done.rows, 0) // size:,}: data.train has {rows:,} rows within the '
                    f'epochs of its components, and {done.rows:,} are taken')


class _Loop:
  """One process's part of a run."""

  def __init__(self, run: Run, data: Prepared, checkpoints: Checkpoints, book: Logbook, options: Options, peak: float):
    self.run, self.data, self.checkpoints, self.book, self.options, self.peak = run, data, checkpoints, book, options, peak
    config = run.config
    self.scorer = Scorer(run.blueprint, run.objective, run.mesh, config.sequences)
    self.flops = flops_per_token(config.model, config.data.context)
    self.compiles = 0
    self.tracing = False
    self.clock = (0.0, 0)  # seconds and tokens at the last logged step
    self.waited = 0.0  # seconds since then in which there was no batch
    self.pending: tuple[int, dict[str, jax.Array]] | None = None

  def go(self, state: TrainState, progress: Progress, last: int) -> None:
    """Runs to step `last`."""
    self.state, self.progress = state, progress
    config, mesh = self.run.config, self.run.mesh
    self.batches = batches(self.run.rows, progress.rows, config.batch_size, my_rows(mesh, config.batch_size),
                           prefetch=config.data.prefetch, workers=config.data.workers)
    counter = CompileCounter()
    self._restart_clock(self.progress.tokens)
    try:
      while self.progress.step < last:
        self._start_trace(self.progress.step + 1)
        self._step(counter)
        self._stop_trace(last)
        self._after_step(last)
    finally:
      counter.close()
      self.batches.close()
      if self.tracing:
        jax.profiler.stop_trace()

  def _step(self, counter: CompileCounter) -> None:
    run, done = self.run, self.progress
    start = time.perf_counter()
    batch = next(self.batches)
    self.waited += time.perf_counter() - start
    self.progress = Progress(done.step + 1, done.rows + run.config.batch_size, done.tokens)
    before = counter.count
    self.state, metrics = run.step(self.state, place_rows(run.mesh, batch, run.config.batch_size))
    self.compiles += counter.count - before
    assert self.compiles == 1, f'the step was compiled {self.compiles} times'
    self._read_pending()
    self.pending = (self.progress.step, metrics)

  def _read_pending(self) -> None:
    """Waits for the step before the one just dispatched, and logs it where it is due."""
    if self.pending is None:
      return
    (step, metrics), self.pending = self.pending, None
    # Waits for the step, so never more than one is ahead; and counted on the host, since a run outgrows an int32.
    self.progress = dataclasses.replace(self.progress, tokens=self.progress.tokens + int(metrics['targets']))
    tokens = self.progress.tokens
    self.book.advance(step)
    if step % self.options.log_every and step not in (1, self.run.steps):
      return
    values = {name: float(value) for name, value in jax.device_get(metrics).items() if name != 'targets'}
    now = time.perf_counter()
    seconds = now - self.clock[0]
    speed = (tokens - self.clock[1]) / seconds
    self.book.step(step, values | {'tokens': tokens, 'tokens_per_second': speed, 'mfu': speed * self.flops / self.peak,
                                   'data_wait': self.waited / seconds})
    self._restart_clock(tokens)

  def _restart_clock(self, tokens: int) -> None:
    self.clock, self.waited = (time.perf_counter(), tokens), 0.0

  def _after_step(self, last: int) -> None:
    run, step = self.run, self.progress.step
    final = step == run.steps
    due = lambda every: bool(every) and step % every == 0
    scheduled = due(run.checkpoint_every)
    save = scheduled or step == last
    # Which checkpoint is best can only be told of those that were validated; stop_at adds no line to the metrics.
    validate = final or due(run.eval_every) or (scheduled and run.config.checkpoint.keep_best)
    if not (validate or save):
      return
    self._read_pending()
    loss = self._validate(final) if validate else None
    if save:
      self.checkpoints.save(self.progress, self.state, loss)
    self._restart_clock(self.progress.tokens)

  def _validate(self, final: bool) -> float:
    settings, step = self.run.config.eval, self.progress.step
    scores = self.scorer.sets(self.state.parameters, self.run.valid, self.data.tags, count=0 if final else settings.rows)
    self.book.validation(step, scores.named())
    if settings.sample_tokens:
      said = self.generator(self.generator.prepare(self.state.parameters), [self.generator.prompt(settings.prompt, 'eval.prompt')],
                            max_tokens=settings.sample_tokens, seeds=[self.run.config.seed])
      self.book.sample(step, settings.prompt, said[0].text)
    return scores.overall.loss

  @functools.cached_property
  def generator(self) -> Generator:
    """For samples."""
    return Generator(self.run.blueprint, self.run.mesh, self.data.tokenizer, self.run.config.zero_stage)

  def _start_trace(self, step: int) -> None:
    if first() and self.options.profile_steps and step == self.options.profile_steps[0]:
      self._read_pending()
      jax.profiler.start_trace(self.options.workdir / 'profile')
      self.tracing = True

  def _stop_trace(self, last: int) -> None:
    if self.tracing and self.options.profile_steps and self.progress.step >= min(self.options.profile_steps[1], last):
      self._read_pending()
      jax.profiler.stop_trace()
      self.tracing = False
      self.book.say(f'trace up to step {self.progress.step} in {self.options.workdir / "profile"}')
      self._restart_clock(self.progress.tokens)
