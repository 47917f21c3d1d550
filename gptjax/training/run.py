"""A run, built once from config, data and devices, and its steps: the rows that each one takes, and its dispatch."""

import dataclasses
import datetime
import functools
import math
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from gptjax import config as configs
from gptjax.checkpoint import Progress
from gptjax.config import INT32_MAX, TOKENS_AXIS, Config, UserError, check_objective, duration_in_steps, schedule_warning
from gptjax.data import EvalRows, Prepared, TrainRows, batches, train_rows
from gptjax.model import (
  AbstractModel, active_parameters, attention_backend, expert_backend, model_of, parameter_count)
from gptjax.distributed import all_gather, process_group
from gptjax.machine import processor
from gptjax.sharding import AnyMesh, check_sizes, describe, process_rows
from gptjax.training.guard import BadSteps
from gptjax.training.objective import make_objective
from gptjax.training.optimizer import learning_rates, make_optimizer
from gptjax.training.standard import Standard
from gptjax.training.sums import ObjectiveFunction
from gptjax.training.step import TrainState, abstract, frozen_names, initializer, train_step


@dataclasses.dataclass(frozen=True)
class Run:
  """A resolved run; all durations are in steps."""

  config: Config
  """with the vocabulary's size and the number of classes filled in"""
  mesh: Mesh
  model: AbstractModel
  objective: ObjectiveFunction
  optimizer: optax.GradientTransformation
  initialize: Callable[[], TrainState]
  step: Any
  """jitted: (state, batch) -> (state, metrics)"""
  rows: TrainRows
  valid: Mapping[str, EvalRows]
  steps: int
  eval_every: int
  checkpoint_every: int
  keep_every: int
  compare_every: int
  warning: str
  """what the config cannot mean; '': nothing"""

  def batches(self, row: int, state: Callable[[], TrainState]) -> Generator[dict[str, np.ndarray], None, None]:
    """The batches from a row on, each with the rows of this process; they do not depend on the state."""
    config = self.config
    return batches(self.rows, row, config.batch_size, process_rows(self.mesh, config.batch_size), prefetch=config.data.prefetch,
                   workers=config.data.workers)

  @functools.cached_property
  def standard(self) -> Standard:
    """The layout of its checkpoints and of evaluation."""
    return Standard(self.config, self.mesh, self.optimizer)

  @property
  def abstract_state(self) -> TrainState:
    """Shapes, dtypes and shardings of the train state."""
    return abstract(self.initialize, self.mesh)


def resolve(config: Config, data: Prepared, mesh: Mesh) -> Run:
  """Builds a Run; to be called, like all that uses it, under `jax.set_mesh(mesh)`.

  Raises a UserError for sizes that the mesh does not divide, a vocabulary too small for the tokenizer, another number of classes than
  the data has, or durations that do not fit.
  """
  tokens, size = data.tokenizer.vocab_size, config.model.vocab_size
  if 0 < size <= data.tokenizer.largest_id:
    needed = f'at least {data.tokenizer.largest_id + 1} for the ids of the tokenizer'
    raise UserError('model.vocab_size', size,
                    f'{needed}, or in data.tokenizer.path the tokenizer of init_from' if config.init_from else f'0, or {needed}')
  classes = len(data.labels)
  if config.model.classes not in (0, classes):
    raise UserError('model.classes', config.model.classes, f'0, or {classes}, the number of data.source.labels: {", ".join(data.labels)}'
                    if classes else '0 without data.source.label')
  if classes > (size or tokens):
    raise UserError('data.source.labels', f'{classes:,} names', f'at most as many as token ids, {size or tokens:,}')
  config = configs.override(config, {'model.vocab_size': size or tokens, 'model.classes': classes})
  # Before training starts, this reports a prompt that cannot be encoded.
  data.tokenizer.encode(configs.unescaped(config.eval.prompt), 'eval.prompt')
  check_sizes(config, mesh)
  rows = train_rows(config, data)
  steps_of = lambda field: in_steps(config, rows, field)
  opt, steps = config.optimizer, steps_of('steps')
  durations = {'steps': steps, 'warmup': steps_of('optimizer.warmup'), 'decay': steps_of('optimizer.decay')}
  warning = schedule_warning(opt, **durations)
  model = model_of(config)
  frozen = frozen_names(model, config)
  check_unsharded(model, config, mesh)
  attention_backend(config.model, config.compute, config.data.context)  # before training starts, reports a kernel that cannot run
  memories = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
  if config.compute.offloaded and 'pinned_host' not in memories:
    raise UserError('compute.offloaded', list(config.compute.offloaded), f'none: the device reaches no memory of the host, only {memories}')
  optimizer = make_optimizer(opt, config.model.width_ratio)
  objective = make_objective(config)
  parts = {layout.store.parts for layout in data.layouts}
  if len(parts) > 1 and max(parts) > 1:
    raise UserError('data.train', sorted(parts), 'stores of pairs alone, or without pairs')
  for name, store in data.valid.items():
    if max(parts) > 1 or config.objective.draws:
      if store.parts != max(parts):
        raise UserError('data.valid', name, 'a store of the same kind of examples as those to train on')
  check_objective(config.objective, parts=max(parts), has_classes=classes > 0)
  return Run(
    config=config, mesh=mesh, model=model, objective=objective, optimizer=optimizer, rows=rows, steps=steps,
    initialize=initializer(model, optimizer, config.zero_stage, mesh, config.seed, frozen),
    step=train_step(model, objective, optimizer, learning_rates(opt, **durations),
                    zero_stage=config.zero_stage, mesh=mesh, microbatches=config.microbatches, seed=config.seed, spike=config.faults.spike,
                    pipeline=config.pipeline, gradient_noise=config.gradient_noise),
    valid=data.valid_rows,
    eval_every=steps_of('eval.every'), checkpoint_every=steps_of('checkpoint.every'), keep_every=steps_of('checkpoint.keep_every'),
    compare_every=steps_of('faults.compare_every'), warning=warning)


def every(count: int, step: int) -> bool:
  """Whether something is due after a step that happens every `count` steps; 0: never."""
  return bool(count) and step % count == 0


def in_steps(config: Config, rows: TrainRows, field: str) -> int:
  """A field's duration in steps; raises a UserError if they are more than a device can count."""
  value, context = configs.flatten(config)[field], config.data.context
  found = duration_in_steps(field, value, batch_size=config.batch_size, context=context,
                            rows_per_epoch=rows.rows_per_epoch * config.objective.rows_per_example)
  if found > INT32_MAX:
    raise UserError(field, value, f'at most {INT32_MAX:,} steps (it is {found:.3g})')
  return found


def check_unsharded(model: AbstractModel, config: Config, mesh: AnyMesh) -> None:
  """Raises a UserError where a larger fraction of the parameters stays unsharded than mesh.max_unsharded allows."""
  fraction, reasons = model.unsharded(config.zero_stage, mesh)
  if fraction > config.mesh.max_unsharded:
    raise UserError('mesh.max_unsharded', config.mesh.max_unsharded, f'at least {math.ceil(1000 * fraction) / 1000}, the fraction of the '
                    f'parameters that stays unsharded, or sizes that divide ({"; ".join(reasons)})')


def header(run: Run, data: Prepared, begun: str, peak: tuple[float, str] | None, flops: float) -> dict[str, Any]:
  """The facts of a run that its figures depend on; `begun` describes the initial state, `peak` is from `peak_flops`, and `flops` are per
  token."""
  config, mesh = run.config, run.mesh
  devices, model = mesh.devices.flatten(), config.model
  fraction, reasons = run.model.unsharded(config.zero_stage, mesh)
  return {
    'device': f'{len(devices)} of {jax.device_count()} {devices[0].device_kind}',
    'processor': processor(),
    'processes': process_group().description,
    'mesh': f'{describe(mesh)}, ZeRO stage {config.zero_stage}',
    **({'unsharded': f'{fraction:.1%} of the parameters; ' + '; '.join(reasons)} if reasons else {}),
    'data': data.description,
    **({'first example, with its targets in ⟦⟧': data.example} if data.example else {}),
    'parameters': parameter_count(model, config.data.context),
    **({'active parameters': active_parameters(model, config.data.context), 'experts': f'{model.experts_per_token} of {model.experts}, '
        + expert_backend(config.compute)} if model.experts else {}),
    **({'adapters': f'{sum(x.size for x in run.abstract_state.trained.values()):,} parameters, which alone are trained; rank '
        f'{config.lora.rank}, scale {config.lora.scale:g}'} if config.lora.rank else {}),
    **({'frozen': f'{frozen:,} of the parameters'} if (frozen := sum(x.size for x in run.abstract_state.frozen.values())) else {}),
    'tokens per step': config.batch_size * config.data.context,
    'steps': f'{run.steps:,}, {run.steps * config.batch_size / run.rows.rows_per_epoch / config.objective.rows_per_example:.2f} epochs',
    'FLOPs per token': flops,
    'peak FLOP/s': f'{peak[0]:.3g}, {peak[1]}' if peak else 'unknown for this device, so no MFU',
    'attention': attention_backend(model, config.compute, config.data.context) if mesh.shape[TOKENS_AXIS] == 1 else
                 f'{config.compute.context_attention} over mesh.{TOKENS_AXIS}={mesh.shape[TOKENS_AXIS]}',
    'precision': f'{config.compute.dtype} compute, float32 parameters',
    'versions': ', '.join(f'{name} {metadata.version(name)}' for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')),
    'commit': _commit(),
    'started': datetime.datetime.now().isoformat(' ', 'minutes'),
    'initial state': begun,
    **({'warning': run.warning} if run.warning else {}),
  }


def _commit() -> str:
  folder = Path(__file__).parent
  git = lambda *args: subprocess.run(['git', '-C', folder, *args], capture_output=True, text=True, check=True).stdout.strip()
  try:
    git('ls-files', '--error-unmatch', __file__)  # an installed package may lie within another project's repository
    return git('rev-parse', '--short', 'HEAD') + (' with changes' if git('status', '--porcelain') else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


Source = Callable[[int, Callable[[], TrainState]], Generator[dict[str, Any], None, None]]
"""(row, a function that returns the state before the next step) -> the batches from that row on, on the mesh."""


class Dispatched(NamedTuple):
  """A step that the devices may still be computing."""

  step: int
  rows: tuple[int, int]
  """its first row and the one after its last"""
  skipped: int
  """number of rows before them that are left out because they were bad in an earlier attempt"""
  metrics: dict[str, jax.Array]


class Steps:
  """Dispatches the steps of a run on batches of `source`, from a state and its progress on, without the rows of `bad_steps`."""

  def __init__(self, run: Run, source: Source, bad_steps: BadSteps, state: TrainState, progress: Progress):
    self._run, self._source, self._bad_steps = run, source, bad_steps
    self.state, self.step, self.row = state, progress.step, progress.rows
    self._loaded: tuple[int, dict[str, Any]] | None = None
    self.waited = 0.0
    """seconds of waiting for batches"""
    self._batches = source(self.row, lambda: self.state)
    self._waits = jax.process_count() > 1 and jax.default_backend() == 'cpu'

  def load(self) -> None:
    """Waits for the next batch, which may be drawn from the model."""
    size = self._run.config.batch_size
    row = self._bad_steps.next_row(self.row, size)
    if row > self.row:
      self._batches.close()
      self._batches = self._source(row, lambda: self.state)
    start = time.perf_counter()
    self._loaded = row, next(self._batches)
    self.waited += time.perf_counter() - start

  def dispatch(self) -> Dispatched:
    """Dispatches the next step without waiting for it, and donates the state before it. The first call compiles the step."""
    if self._loaded is None:
      self.load()
      assert self._loaded
    (row, batch), self._loaded, size = self._loaded, None, self._run.config.batch_size
    if self._waits:
      self._compile(batch)
    self.state, metrics = self._run.step(self.state, batch)
    skipped, self.step, self.row = row - self.row, self.step + 1, row + size
    return Dispatched(self.step, (row, self.row), skipped, metrics)

  def _compile(self, batch: dict[str, Any]) -> None:
    """Compiles the step on CPUs, and waits until the other processes have done so: only the first one finds its programs in the cache, and
    Gloo allows the others 30 seconds to come to the first exchange."""
    self._run.step.lower(self.state, batch).compile()
    all_gather('compiled', True)
    self._waits = False

  def close(self) -> None:
    """Ends the threads that load batches."""
    self._batches.close()
