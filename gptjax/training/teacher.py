"""The teacher of a distillation: its hidden states for the rows of each step, which the student's step turns into probabilities.

It runs outside of the step, on the mesh without pipelines and context parallelism: every device has rows of its own, whatever the
student's layout, and its parameters are sharded over all devices. Hidden states take the place of logits, which are many times as large.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.checkpoint import TEACHER
from gptjax.config import BATCH_AXES, LAYERS_AXIS, TENSOR_AXIS, TOKENS_AXIS, UserError, divisors
from gptjax.data import Tokenizer, load_tokenizer
from gptjax.files import expanded
from gptjax.inference.forward import forward
from gptjax.model import AbstractModel, FixedHead, flops_per_token, positions_of, stored_model
from gptjax.sharding import BATCH_SPEC, TOKENS_SPEC, batch_shards, spec, token_order, viewed
from gptjax.training.run import Run
from gptjax.training.sums import Batch
from gptjax.training.workdir import Source


def teacher_of(run: Run, tokenizer: Tokenizer) -> Source | None:
  """The checkpoint that objective.teacher names; None without distillation. Raises a UserError for one that cannot teach the run."""
  if run.config.objective.kind != 'distillation':
    return None
  path, context = run.config.objective.teacher, run.config.data.context
  source = Source(expanded(path, 'objective.teacher'), 'objective.teacher')
  if source.config.model.classes:
    raise UserError('objective.teacher', path, 'a model of tokens; this one classifies texts')
  if load_tokenizer(source.tokenizer).pieces != tokenizer.pieces:  # chat templates and such may differ
    raise UserError('objective.teacher', path, f'a model with the vocabulary of this run; its own is in '
                    f'data.tokenizer.path={source.tokenizer}')
  if source.config.model.positions == 'learned' and source.config.data.context < context:
    raise UserError('objective.teacher', path, f'a run with learned positions up to data.context={context}; it has '
                    f'{source.config.data.context}')
  _check_mesh(source, run)
  return source


def _check_mesh(source: Source, run: Run) -> None:
  heads, parts = source.config.model.heads, run.mesh.shape[TENSOR_AXIS]
  if heads % parts:
    raise UserError(f'mesh.{TENSOR_AXIS}', parts, f'a divisor of the {heads} heads of objective.teacher too: {divisors(heads)}')


def teacher_flops(run: Run, workdir: Path) -> float:
  """FLOPs per token of the teacher in a workdir; 0 if there is none."""
  if run.config.objective.kind != 'distillation':
    return 0
  return flops_per_token(Source(workdir / TEACHER, 'objective.teacher').config.model, run.config.data.context) / 3  # a forward pass


class Teacher:
  """The model in a workdir from which its run learns. All processes must make and call it."""

  def __init__(self, run: Run, workdir: Path):
    source, standard = Source(workdir / TEACHER, 'objective.teacher'), run.standard
    _check_mesh(source, run)
    compute = dataclasses.replace(standard.model.compute, scan=source.config.compute.scan, attention='auto', sequence_parallel=False)
    self._mesh = standard.mesh
    self._model = stored_model(dataclasses.replace(source.config, compute=compute)).base
    shardings, dtypes = self._model.shardings(3, self._mesh), self._model.dtypes
    with jax.set_mesh(self._mesh):
      self._parameters = source.checkpoints.restore_parameters(source.step, {
        name: jax.ShapeDtypeStruct(shape.shape, dtypes[name], sharding=shardings[name]) for name, shape in self._model.shapes.items()})
      rows = _head_rows(self._model, self._parameters, run.config.model.table_rows)
    vocab_size = min(run.config.model.vocab_size, source.config.model.vocab_size)
    self._head = FixedHead(viewed(rows, run.mesh, jax.typeof(rows).sharding.spec), vocab_size, source.config.model.logit_cap)
    self._hidden = _hidden_states(self._model, self._mesh, run.config.microbatches)
    self._moves = None if self._mesh == run.mesh else _Moves(run.mesh, self._mesh, run.config.batch_size, run.config.data.context)

  def __call__(self, batch: Batch) -> Batch:
    """The batch, which is on the run's mesh, with hidden states and head of the teacher."""
    rows: Batch = {name: batch[name] for name in ('tokens', 'positions', 'segments') if name in batch}
    rows = self._moves.there(rows) if self._moves else rows
    with jax.set_mesh(self._mesh):
      hidden = self._hidden(self._parameters, rows)
    if jax.default_backend() == 'cpu':
      jax.block_until_ready(hidden)  # virtual devices may deadlock with more programs at once
    return batch | {'teacher': self._moves.back(hidden) if self._moves else hidden, 'teacher_head': self._head}


def _head_rows(model: AbstractModel, parameters: dict[str, jax.Array], count: int) -> jax.Array:
  """W^T of a model's head with `count` rows, which are cut or zero, complete but for the axis that splits matrices."""
  is_table = model.config.head_is_table

  @jax.jit
  def rows(w):
    w = jax.reshard(w, PartitionSpec())
    w = (w if is_table else w.T)[:count]
    return jax.reshard(jnp.pad(w, ((0, count - w.shape[0]), (0, 0))), spec(('vocab', count), None))

  return rows(parameters['tokens/table' if is_table else 'lm_head/kernel'])


@functools.lru_cache(maxsize=4)
def _hidden_states(model: AbstractModel, mesh: Mesh, microbatches: int) -> Callable:
  """The jitted function (parameters, batch) -> hidden states [B, T, H], of parts of a device's rows in turn."""
  def local(module, batch):
    def one(_, rows):
      hidden = module.hidden(rows['tokens'], positions_of(rows))[0]
      return None, hidden.reshape(*rows['tokens'].shape, -1).astype(model.compute.dtype)

    parts = math.gcd(microbatches, len(batch['tokens']))
    if parts == 1:
      return one(None, batch)[1]
    found = jax.lax.scan(one, None, jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch))[1]
    return found.reshape(-1, *found.shape[2:])

  return jax.jit(forward(model, mesh, 3, local, (BATCH_SPEC,), BATCH_SPEC))


class _Moves:
  """Moves rows from a run's mesh, on which devices may share them, to its `folded` one, and their hidden states back.

  The devices that share rows there divide them here. So that they need no others, each group's rows are filled up to a multiple of them.
  """

  def __init__(self, run_mesh: Mesh, mesh: Mesh, batch_size: int, length: int):
    self._run_mesh, self._mesh = run_mesh, mesh
    order = token_order(length, run_mesh.shape[TOKENS_AXIS])
    groups = batch_shards(run_mesh)
    each, sharing = batch_size // groups, batch_shards(mesh) // groups
    padding = -each % sharing
    divided = PartitionSpec((*BATCH_AXES, LAYERS_AXIS, TOKENS_AXIS))

    def grouped(x, change):
      """x with each group's rows changed."""
      return (found := change(x.reshape(groups, -1, *x.shape[1:]))).reshape(-1, *found.shape[2:])

    def there(x):
      x = jax.reshard(x, BATCH_SPEC)[:, np.argsort(order)]
      return jax.reshard(grouped(x, lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0)))), divided)

    def back(x):
      x = grouped(jax.reshard(x, BATCH_SPEC), lambda x: x[:, :each])
      return jax.reshard(x[:, order], TOKENS_SPEC)

    self._there, self._back, self._divided = jax.jit(lambda rows: jax.tree.map(there, rows)), jax.jit(back), divided

  def there(self, rows: Batch) -> Batch:
    """Arrays [B, T] of the run's mesh on the other one."""
    return {name: viewed(x, self._mesh, BATCH_SPEC) for name, x in self._there(rows).items()}

  def back(self, hidden: jax.Array) -> jax.Array:
    """Hidden states [B, T, H] on the run's mesh, their tokens in its order."""
    return self._back(viewed(hidden, self._run_mesh, self._divided))
