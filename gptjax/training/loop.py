"""The training loop: one compiled step, dispatched before the metrics of the step before are read."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress, Retention
from gptjax.compilations import CompileCounter
from gptjax.config import Config, Fault, UserError
from gptjax.data import Prepared, cores, prepare
from gptjax.distributed import all_gather, broadcast, is_primary, process_group
from gptjax.files import write_json
from gptjax.model import step_flops
from gptjax.sharding import make_mesh
from gptjax.sharding.chips import peak_flops
from gptjax.training.batches import source_of
from gptjax.training.guard import MAX_CONSECUTIVE, BadSteps, Rollback, replica_check
from gptjax.training.interruptions import REQUEUE_EXIT_CODE, Interruptions, StopRequest, Watchdog
from gptjax.training.logbook import Logbook, NullLogbook
from gptjax.training.reference import add_references
from gptjax.training.rewards import make_rewards
from gptjax.training.run import Dispatched, Run, Source, Steps, every, header, resolve
from gptjax.training.workdir import initial_state, keep_sources, lock, open_workdir, restore, starting_point, wait_until_visible
from gptjax.training.step import TrainState
from gptjax.training.teacher import teacher_flops, teacher_of
from gptjax.training.validation import Validation

RETRY = 30.0
"""Seconds after which a save that failed is tried again."""
MAX_RETRIES = 10
"""Maximum number of attempts of the last save, which the run waits for."""
MAX_ROLLBACKS = 10
"""Maximum number of consecutive rollbacks without a new checkpoint."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Settings of a process that trains, beside the config of its run."""

  workdir: Path
  cache_dir: Path
  log_every: int = 10
  """steps between logged lines"""
  stop_at: int = 0
  """step after which this process saves and ends; 0: the last"""
  profile_steps: tuple[int, int] | None = None
  """first and last step of a profiler trace"""
  accept_changes: bool = False
  """resume with a config that computes other values than the workdir's"""
  reward_file: Path | None = None
  """file of Python with the user's own rewards"""
  hang_timeout: float = 0.0
  """seconds without progress after which the process ends; 0: none"""


def train(config: Config, options: Options) -> int:
  """Trains, from the workdir's newest intact checkpoint on if it has one; returns the exit status, `REQUEUE_EXIT_CODE` if interrupted."""
  if config.lacks_chat_template:  # before a tokenizer is trained, which would have none
    raise UserError('init_from', config.init_from, 'the folder of a run, whose tokenizer has a chat template for data.source.chat=template')
  data = _prepare(config, options.cache_dir)
  mesh = make_mesh(config.mesh)
  assert jax.process_count() == process_group().count, 'processes of one run join through gptjax.start'
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    run = resolve(config, data, mesh)
    rewards = make_rewards(config.objective.rewards, options.reward_file)  # before the workdir exists, since one may be unknown
    last, folder = min(run.steps, options.stop_at or run.steps), options.workdir
    if is_primary():
      stack.enter_context(lock(folder))
    broadcast('lock')
    checkpoints = stack.enter_context(Checkpoints(
      folder / 'checkpoints', Retention(config.checkpoint.keep, run.keep_every, config.checkpoint.keep_best),
      extra_files=(folder / 'config.json', folder / 'data' / 'identity.json', folder / 'data' / 'tokenizer')))
    newest = checkpoints.newest()
    progress = Progress() if newest is None else checkpoints.progress(newest)
    if options.profile_steps and options.profile_steps[0] > last:  # a trace of steps that are done was written by an earlier process
      raise UserError('--profile_steps', ':'.join(map(str, options.profile_steps)),
                      f'a first step of at most {last}, the last of this process')
    bad_steps = BadSteps(config.faults, folder, writes=is_primary())
    _check_rows(run, progress, last, bad_steps)
    if newest is None:  # before config.json is written, since init_from may be wrong
      start, teacher = starting_point(run), teacher_of(run, data.tokenizer)
      state, begun = initial_state(run, data.tokenizer, start)
    changed = open_workdir(folder, run, data, None if newest is None else progress, options.accept_changes) if is_primary() else []
    if newest is None and is_primary():
      keep_sources(run, folder, start, teacher)
    wait_until_visible(folder)
    add_references(run, folder)
    if newest is not None:
      state, begun = restore(checkpoints, newest, run)[0], f'checkpoint of step {progress.step}, {progress.tokens:,} tokens'
    elif config.init_from:  # a run that resumes does not read the other run again
      checkpoints.save(progress, run.standard.saved(state), None, waits=True)
    peak = peak_flops(list(mesh.devices.flatten()))
    book = stack.enter_context(contextlib.closing(Logbook(folder, progress.step, run.steps) if is_primary() else NullLogbook()))
    flops = step_flops(run.model, run.abstract_state.frozen) + teacher_flops(run, folder)
    facts = header(run, data, begun, peak, flops)
    book.header(facts | ({'changed': '; '.join(changed)} if changed else {}), configs.flatten(run.config))
    if progress.step >= last:
      book.say(f'nothing to do: step {progress.step} of {last} is done')
      return 0
    if is_primary():
      write_json(folder / 'run.json', facts)
    if 0 < run.checkpoint_every < last - progress.step:  # while the step compiles, which leaves processors idle
      checkpoints.prepare(run.standard.saved(state))
    watchdog = stack.enter_context(Watchdog(options.hang_timeout, folder))
    interruptions = stack.enter_context(Interruptions(mesh, run.config.checkpoint.minutes))
    source = source_of(run, data, folder, rewards, watchdog.progress)
    validation = Validation(run, data, book, watchdog.progress, rewards)
    loop = _Loop(run, source, [(validation.due, validation)], lambda: initial_state(run, data.tokenizer)[0], options, checkpoints, book,
                 peak and peak[0], flops, watchdog, interruptions, bad_steps)
    return loop.run_to(last, state, progress)


def _prepare(config: Config, cache_dir: Path) -> Prepared:
  """The data: process 0 makes it first, so that the others find it in a cache they share, or make it on a disk of their own."""
  data = prepare(config.data, cache_dir, cores()) if is_primary() else None
  fingerprint = broadcast('data', data and data.fingerprint)
  data = data or prepare(config.data, cache_dir, cores())
  if data.fingerprint != fingerprint:
    raise UserError('data', data.fingerprint, f'{fingerprint}, the fingerprint of documents, split and tokenizer in process 0')
  return data


def _check_rows(run: Run, done: Progress, last: int, bad_steps: BadSteps) -> None:
  if run.rows.mixture.rows is None:
    return
  rows, size = run.rows.mixture.rows * run.config.objective.rows_per_example, run.config.batch_size
  taken = done.rows + bad_steps.excluded_after(done.rows)
  if taken + (last - done.step) * size > rows:
    most = done.step + max(rows - taken, 0) // size
    raise UserError('steps', last, f'at most {most}, or --stop_at={most}: data.train has {rows:,} rows by the epochs of its '
                    f'components, of which {taken:,} are used')


Action = tuple[Callable[[int], bool], Callable[[int, TrainState], float | None]]
"""(step) -> whether it is due; (step, state) -> the loss by which checkpoints are compared, if the action finds one."""


class _Moment(NamedTuple):
  """The time at which a step ended, for the speed."""

  seconds: float
  waited: float
  """seconds of waiting for batches up to it"""
  tokens: float
  """targets seen up to it"""


class _Loop:
  """One process's part of a run, with batches from `source`, and `actions` after steps.

  `fresh` makes the state of step 0; `peak` is in FLOP/s of all devices, None if unknown; `flops` are per token.
  """

  def __init__(self, run: Run, source: Source, actions: Sequence[Action], fresh: Callable[[], TrainState], options: Options,
               checkpoints: Checkpoints, book: Logbook, peak: float | None, flops: float, watchdog: Watchdog, interruptions: Interruptions,
               bad_steps: BadSteps):
    self.run, self.source, self.actions, self.fresh, self.options = run, source, actions, fresh, options
    self.checkpoints, self.book, self.peak = checkpoints, book, peak
    self.watchdog, self.interruptions, self.bad_steps = watchdog, interruptions, bad_steps
    stores = [layout.store for layout in run.rows.layouts]
    read = sum(store.tokens for store in stores) / sum(store.targets for store in stores)  # tokens per target
    if run.config.objective.draws:
      self.peak = None  # drawing completions is most of the work
    self.flops = flops * read
    self.check = replica_check(run.abstract_state, run.mesh)
    self.counter = CompileCounter()
    self.compiles = 0
    self.rollbacks = 0  # since the last checkpoint
    self.failures = collections.Counter[str]()  # to save, since the last checkpoint, by reason
    self.tracing = False
    self.empty = 0  # steps of this process whose batch had no targets

  def run_to(self, last: int, state: TrainState, progress: Progress) -> int:
    """Runs from a state to step `last`; returns the exit status."""
    self._begin(state, progress)
    del state  # the first step reuses its memory
    self.book.say('compiling the step')
    try:
      while self.steps.step < last:
        try:
          self._start_trace(self.steps.step + 1)
          self._step()
          self._stop_trace(last)
          if self._after_step(last) == StopRequest.STOP:
            self.book.say(f'{self.interruptions.reason}: saved step {self.steps.step} of {last}, ending; the same command resumes the run')
            return REQUEUE_EXIT_CODE
        except Rollback as reason:
          self._roll_back(reason, last)
      return 0
    finally:
      self.counter.close()
      self.steps.close()
      if self.tracing:
        jax.profiler.stop_trace()

  def _begin(self, state: TrainState, progress: Progress) -> None:
    """Continues from a state, which is new or from a checkpoint."""
    self.watchdog.progress()
    self.bad_steps.resume_from(progress.step)
    self.steps = Steps(self.run, self.source, self.bad_steps, state, progress)
    self.pending: Dispatched | None = None
    self.tokens: float = progress.tokens
    self.clock: _Moment | None = None  # up to which the speed is logged; the first step is not measured, since it is compiled

  def _step(self) -> None:
    ended = self.pending and self.pending.metrics['bad'].is_ready()  # type: ignore[attr-defined]  # jax declares it for ArrayImpl only
    over = self._now() if ended else None
    self.steps.load()
    before = self.counter.count  # without the programs that draw completions
    dispatched = self.steps.dispatch()
    self.compiles += self.counter.count - before
    if self.counter.count > before and self.compiles > 1:  # slow, but no reason to end a run
      self.book.say(f'step {dispatched.step}: compiled again, {self.compiles} times so far; a run should compile its step once')
    if dispatched.skipped:
      first = dispatched.rows[0]
      self.book.say(f'step {dispatched.step}: rows {first - dispatched.skipped:,} to {first - 1:,} are skipped')
    self._read_pending(over)
    self.pending = dispatched
    self.watchdog.progress()

  def _read_pending(self, over: _Moment | None = None) -> None:
    """Waits for the pending step, and logs it if that is due; `over`: a moment at which it had ended, before the next was dispatched."""
    if self.pending is None:
      return
    (step, rows, _, metrics), self.pending = self.pending, None
    # This waits for the step, so that never more than one is ahead. Tokens are counted on the host, since they may exceed an int32.
    bad = bool(metrics['bad'])
    targets = 0 if bad else float(metrics['targets'])
    now = over or self._now()  # before anything is written, since the next step runs meanwhile
    self.tokens += targets if targets % 1 else int(targets)  # weights of examples may be fractions
    self.book.advance(step)
    if bad:
      self._compare()  # the reason may be a device instead of the batch
      self.book.say(f'{self.bad_steps.add(step, rows, float(metrics["loss"]), float(metrics["grad_norm"]))}: update not applied')
    elif not targets:
      self._report_empty(step, rows)
    due = (bad or targets) and (step % self.options.log_every == 0 or step in (1, self.run.steps))
    if due:
      values = {name: value.tolist() for name, value in jax.device_get(metrics).items() if name not in ('targets', 'bad')}
      self.book.step(step, values | {'tokens': round(self.tokens)} | self._speed(now))
    if due or self.clock is None:
      self.clock = now._replace(tokens=self.tokens)

  def _speed(self, now: _Moment) -> dict[str, float]:
    """Figures of the time since the clock was set, if it was, and if there were tokens; MFU only where the devices' peak is known."""
    if self.clock is None or self.tokens == self.clock.tokens:
      return {}
    seconds, waited = now.seconds - self.clock.seconds, now.waited - self.clock.waited
    speed = (self.tokens - self.clock.tokens) / seconds
    mfu = {'mfu': speed * self.flops / self.peak} if self.peak else {}
    return {'tokens_per_second': speed, **mfu, 'data_wait': waited / seconds}

  def _now(self) -> _Moment:
    return _Moment(time.perf_counter(), self.steps.waited, self.tokens)

  def _report_empty(self, step: int, rows: tuple[int, int]) -> None:
    """Reports a step whose batch has no targets, and so no update; raises a UserError if the run has found none at all for too long."""
    self.empty += 1
    if not self.tokens and (step == self.run.steps or self.empty == MAX_CONSECUTIVE):
      raise UserError('data', f'{self.empty} batches without targets', 'rows with targets: tokens that the objective predicts and the mask '
                      'does not exclude')
    self.book.say(f'step {step}: rows {rows[0]:,} to {rows[1] - 1:,} have no targets: no update; {self.empty} such steps so far')

  def _after_step(self, last: int) -> StopRequest:
    """Compares replicas, acts and saves if that is due; returns the request that was acted on."""
    run, step = self.run, self.steps.step
    request = self.interruptions.poll()
    save = every(run.checkpoint_every, step) or step == last or request > StopRequest.NONE
    compare, due = save or every(run.compare_every, step), [act for is_due, act in self.actions if is_due(step)]
    if compare or due:
      self._read_pending()
    if compare:
      self._compare()
    losses = [loss for act in due if (loss := act(step, self.steps.state)) is not None]
    if save:
      self._save(losses[0] if losses else None, waits=step == last or request == StopRequest.STOP)
    elif not self.checkpoints.saving:
      self._attempt(self.checkpoints.wait)
    if due or save:
      self.clock = self._now()
    return request if step < last else StopRequest.NONE

  def _compare(self) -> None:
    """Raises a Rollback or a Fault if a device holds wrong values: no checkpoint may contain them, and skipping a step does not help."""
    if wrong := self.check(self.steps.state):
      text = f'{wrong} at step {self.steps.step}, expected: finite values, the same in all copies'
      if self.run.config.faults.bad_step == 'rollback':
        raise Rollback(text)
      raise Fault(f'{text}; run the same command again to resume from the last checkpoint, without that device if it fails again')

  def _save(self, loss: float | None, waits: bool) -> None:
    """Saves; after a failure all processes try again, later or, if this is the last save, now."""
    self.interruptions.saved()
    for left in reversed(range(MAX_RETRIES if waits else 1)):
      self._attempt(self.checkpoints.wait)  # of the save before
      self.watchdog.progress()
      failed = self._attempt(lambda: self._save_once(loss, waits), final=waits and not left)
      self.watchdog.progress()
      if not waits or not any(all_gather('saved', failed)):
        return
      time.sleep(RETRY)

  def _save_once(self, loss: float | None, waits: bool) -> bool:
    # All processes take part in a save: if process 0 cannot save, none can.
    if refusal := broadcast('save', self._refusal() if is_primary() else None):
      raise UserError.from_text(refusal)
    state = self.run.standard.saved(self.steps.state)
    self.checkpoints.save(Progress(self.steps.step, self.steps.row, self.tokens), state, loss, waits)
    self.rollbacks = 0
    return waits

  def _refusal(self) -> str:
    """Why process 0 cannot save."""
    try:
      if not (self.options.workdir / 'config.json').exists():
        raise UserError('--workdir', str(self.options.workdir), 'the workdir of this run, which was deleted or moved while it trained')
      self.book.flush()  # the records of a checkpoint's steps are on the disk before it is
      self.bad_steps.flush()
    except (UserError, OSError) as error:
      return str(error)
    return ''

  def _attempt(self, save: Callable[[], bool], final: bool = False) -> bool:
    """Tries to save; returns whether that failed for a reason that may pass, and training continues meanwhile.

    `save` returns whether a checkpoint was committed. Failures of the same reason are reported at the 1st, 2nd, 4th, 8th ... time.
    """
    try:
      committed = save()
    except UserError as error:
      if final:
        raise
      self.interruptions.save_in(RETRY)
      self.failures[str(error)] += 1
      if (count := self.failures[str(error)]).bit_count() == 1:
        self.book.say(f'not saved: {error}; trying again every {RETRY:g} s' + (f', {count} times so far' if count > 1 else ''))
      return True
    if committed and self.failures:
      self.book.say(f'saved, after {self.failures.total()} failures')
      self.failures.clear()
    return False

  def _roll_back(self, reason: Rollback, last: int) -> None:
    """Returns to the newest checkpoint, or to the start if there is none."""
    self.rollbacks += 1
    if self.rollbacks > MAX_ROLLBACKS:
      raise Fault(f'{reason}; the run was rolled back {MAX_ROLLBACKS} times without reaching a new checkpoint')
    self._attempt(self.checkpoints.wait)
    self.steps.close()
    newest = self.checkpoints.newest()
    del self.steps.state
    state, progress = (self.fresh(), Progress()) if newest is None else restore(self.checkpoints, newest, self.run)
    self.book.rewind(progress.step)
    self.book.say(f'{reason}: rolling back to step {progress.step}')
    self._begin(state, progress)
    _check_rows(self.run, progress, last, self.bad_steps)

  def _start_trace(self, step: int) -> None:
    if is_primary() and self.options.profile_steps and not self.tracing and step == self.options.profile_steps[0]:
      self._read_pending()
      jax.profiler.start_trace(self.options.workdir / 'profile')
      self.tracing = True

  def _stop_trace(self, last: int) -> None:
    if self.tracing and self.options.profile_steps and self.steps.step >= min(self.options.profile_steps[1], last):
      self._read_pending()
      jax.profiler.stop_trace()
      self.tracing = False
      self.book.say(f'trace up to step {self.steps.step} in {self.options.workdir / "profile"}')
      self.clock = self._now()
