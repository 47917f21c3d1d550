"""The training loop: one compiled step, dispatched before the metrics of the step before are read."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress
from gptjax.config import Config, UserError
from gptjax.data import Prepared, export, prepare
from gptjax.evaluation import Score, Scorer, model_inputs
from gptjax.inference import Generator, Sampling
from gptjax.model import flops_per_token
from gptjax.sharding import make_mesh, place
from gptjax.training.hardware import CompileCounter, peak_flops
from gptjax.training.logbook import Logbook
from gptjax.training.run import Run, header, resolve

MAY_CHANGE = ('steps', 'batch_size', 'microbatches', 'zero_stage', 'z_loss', 'mesh.', 'eval.', 'checkpoint.', 'optimizer.',
              'model.attention', 'model.remat', 'model.dropout', 'model.compute_dtype', 'data.files')
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
  data = prepare(config.data, options.cache_dir)
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    run = resolve(config, data)
    changed = _claim(options.workdir, run.config, data)
    checkpoints = Checkpoints(options.workdir / 'checkpoints', config.checkpoint)
    try:
      _Loop(run, data, checkpoints, options).go(changed)
    finally:
      checkpoints.close()


def _claim(workdir: Path, config: Config, data: Prepared) -> list[str]:
  """Makes the workdir self-contained, or checks that it is of this run; returns what changed since it started."""
  file = workdir / 'config.json'
  changed = []
  if file.exists():
    old = configs.from_json(file.read_text(), str(file))
    for name, (was, now) in configs.differences(old, config).items():
      if not name.startswith(MAY_CHANGE) or name == 'optimizer.name':
        raise UserError(name, now, f'{was!r}, with which this workdir was started; another --workdir for another run')
      changed.append(f'{name} {was} -> {now}')
  export(data, workdir / 'data')
  partial = file.with_suffix('.partial')
  partial.write_text(configs.to_json(config))
  partial.rename(file)
  return changed


class _Loop:
  """One process's part of a run."""

  def __init__(self, run: Run, data: Prepared, checkpoints: Checkpoints, options: Options):
    self.run, self.data, self.checkpoints, self.options = run, data, checkpoints, options
    steps = checkpoints.steps()
    if steps:
      self.state, self.progress = checkpoints.restore(steps[-1], run.abstract_state)
    else:
      self.state, self.progress = run.initialize(), Progress()
    self.book = Logbook(options.workdir, self.progress.step, run.steps)
    config = run.config
    scorer = lambda count: Scorer(run.blueprint, run.objective, run.valid, run.mesh, count=count,
                                  batch_size=config.batch_size // config.microbatches,
                                  isolate_documents=config.data.isolate_documents)
    self.score_all = scorer(0)
    self.score_some = scorer(config.eval.rows) if config.eval.rows else self.score_all
    self.peak = peak_flops(list(run.mesh.devices.flatten()), config.model.compute_dtype)
    self.flops = flops_per_token(config.model, config.data.context)
    self.compiles = 0
    self.tracing = False
    self.pending: tuple[Progress, dict[str, jax.Array]] | None = None
    self.clock = (0.0, 0)  # seconds and tokens at the last logged step

  def go(self, changed: list[str]) -> None:
    """Runs to the last step, or to stop_at."""
    facts = header(self.run, self.data, self.progress, self.peak)
    (self.options.workdir / 'run.json').write_text(json.dumps(facts, indent=2) + '\n')
    self.book.header(facts | ({'changed': '; '.join(changed)} if changed else {}))
    counter = CompileCounter()
    try:
      last = min(self.run.steps, self.options.stop_at or self.run.steps)
      if self.progress.step >= last:
        self.book.say(f'nothing to do: step {self.progress.step} of {last} is done')
      self._restart_clock()
      while self.progress.step < last:
        self._profile(starting=self.progress.step + 1)
        self._step(counter)
        self._profile(done=self.progress.step if self.progress.step < last else sys.maxsize)
        self._after_step(last)
    finally:
      counter.close()
      self.book.close()

  def _step(self, counter: CompileCounter) -> None:
    run, done = self.run, self.progress
    batch = model_inputs(run.rows.batch(done.rows, run.config.batch_size), run.config.data.isolate_documents)
    # Counted on the host: a row's mask is known before the devices see it, and a run outgrows an int32.
    self.progress = Progress(done.step + 1, done.rows + run.config.batch_size, done.tokens + int(batch['mask'].sum()))
    before = counter.count
    self.state, metrics = run.step(self.state, place(run.mesh, batch, 'batch', None))
    self.compiles += counter.count - before
    assert self.compiles <= 1, f'the step was compiled {self.compiles} times'
    self._read_pending()
    self.pending = (self.progress, metrics)

  def _read_pending(self) -> None:
    """Waits for the step before the one just dispatched, and logs it where it is due."""
    if self.pending is None:
      return
    (progress, metrics), self.pending = self.pending, None
    step = progress.step
    self.book.advance(step)
    if step % self.options.log_every and step != self.run.steps and step != 1:
      jax.block_until_ready(metrics['loss'])  # never more than one step ahead of the devices
      return
    values = {name: float(value) for name, value in jax.device_get(metrics).items() if name != 'targets'}
    now = time.perf_counter()
    speed = (progress.tokens - self.clock[1]) / (now - self.clock[0])
    self.clock = (now, progress.tokens)
    self.book.step(step, values | {'tokens': progress.tokens, 'tokens_per_second': speed,
                                   'mfu': speed * self.flops / self.peak[0]})

  def _restart_clock(self) -> None:
    self.clock = (time.perf_counter(), self.progress.tokens)

  def _after_step(self, last: int) -> None:
    run, step = self.run, self.progress.step
    final = step == run.steps
    save = step == last or bool(run.checkpoint_every) and step % run.checkpoint_every == 0
    # Which checkpoint is best can only be told of those that were validated; stop_at adds no line to the metrics.
    due = bool(run.eval_every) and step % run.eval_every == 0
    validate = final or due or save and step != last and run.config.checkpoint.keep_best
    if not (validate or save):
      return
    self._read_pending()
    loss = self._validate(final) if validate else None
    if save:
      self.checkpoints.save(self.progress, self.state, loss)
    self._restart_clock()

  def _validate(self, final: bool) -> float:
    step = self.progress.step
    score: Score = (self.score_all if final else self.score_some)(self.state.parameters)
    self.book.validation(step, 'valid', score)
    settings = self.run.config.eval
    if settings.sample_tokens:
      self.book.sample(step, settings.prompt, self._sample(settings.prompt, settings.sample_tokens))
    return score.loss

  def _sample(self, prompt: str, tokens: int) -> str:
    if not hasattr(self, 'generator'):
      tokenizer = self.data.tokenizer
      forbidden = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id)
      self.generator = Generator(self.run.blueprint, self.run.mesh, Sampling(), forbidden)
    return ''.join(self.generator.text(self.state.parameters, self.data.tokenizer, prompt, tokens,
                                       jax.random.key(self.run.config.seed)))

  def _profile(self, *, starting: int = 0, done: int = 0) -> None:
    """Traces from the start of the first step asked for to the end of the last, or of the run."""
    if self.options.profile_steps is None:
      return
    first, last = self.options.profile_steps
    folder = self.options.workdir / 'profile'
    if starting == first:
      self._read_pending()
      jax.profiler.start_trace(folder)
      self.tracing = True
    if self.tracing and done >= last:
      self._read_pending()
      jax.profiler.stop_trace()
      self.tracing = False
      self.book.say(f'trace from step {first} in {folder}')
