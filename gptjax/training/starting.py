"""Where a run begins: fresh parameters, or another run's, whole or in part. Optimizer state, step and data are its own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import PartitionSpec

from gptjax.checkpoint import Checkpoints
from gptjax.checkpoint.manifest import MANIFEST
from gptjax.config import UserError, read_config
from gptjax.data import Tokenizer, load_tokenizer
from gptjax.files import expanded
from gptjax.model import AbstractModel, abstract_model, stack_layers, unstack_layers
from gptjax.sharding import Axis
from gptjax.training.run import Run
from gptjax.training.step import TrainState

_RESIZED = ('vocab', 'positions', 'layers')
"""Logical axes of which a part can be taken: the first rows of a table, the first layers of a stack."""


def initial_state(run: Run, tokenizer: Tokenizer) -> tuple[TrainState, str]:
  """The state of step 0, and in words what its parameters are.

  Args:
    run: `init_from` of its config names a workdir, whose newest checkpoint is taken, or the folder of one checkpoint.
    tokenizer: of the run.

  Raises:
    UserError: no such checkpoint, or one that fits only in part where `init_partial` gives no leave for that.
  """
  path = run.config.init_from
  if not path:
    return run.initialize(), 'nothing, fresh parameters'
  source = _open(expanded(path))
  plan = run.model
  in_layout = stack_layers if plan.compute.scan else unstack_layers
  shapes = in_layout(source.plan.shapes)
  differences = _differences(plan, shapes)
  if source.tokenizer.sha256 != tokenizer.sha256:
    differences = [f'another tokenizer, of {source.tokenizer.vocab_size:,} ids', *differences]
  if differences and not run.config.init_partial:
    raise UserError('init_from', path, 'a run with the same parameters and tokenizer, or --config.init_partial for what there is: '
                    f'{_listed(differences)}')
  state = run.initialize()
  shardings = source.plan.shardings(3, run.mesh)
  found = source.checkpoints.restore_parameters(source.step, {
    name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name]) for name, shape in source.plan.shapes.items()})
  found = in_layout(found)
  take = lambda parameters: {name: _taken(fresh, found.pop(name, None)) for name, fresh in parameters.items()}
  words = f'nothing, parameters of {path}, step {source.step}' + (f', in part: {_listed(differences)}' if differences else '')
  return state._replace(trained=take(state.trained), frozen=take(state.frozen)), words


@dataclasses.dataclass(frozen=True)
class _Source:
  checkpoints: Checkpoints
  step: int
  plan: AbstractModel
  tokenizer: Tokenizer


def _open(path: Path) -> _Source:
  """A checkpoint of its own, or a workdir's newest."""
  if (path / MANIFEST).exists() and path.name.isdecimal():
    checkpoints, step, home, tokenizer = Checkpoints(path.parent), int(path.name), path, path / 'tokenizer'
  else:
    if not (path / 'config.json').exists():
      raise UserError('init_from', str(path), 'a folder that gptjax.train or tools.import_hf made, or one of its checkpoints/STEP')
    checkpoints, home, tokenizer = Checkpoints(path / 'checkpoints'), path, path / 'data' / 'tokenizer'
    newest = checkpoints.newest()
    if newest is None:
      raise UserError('init_from', str(path), 'a run that has a checkpoint')
    step = newest
  config = read_config(home)
  return _Source(checkpoints, step, abstract_model(config.model, config.compute, config.data.context), load_tokenizer(tokenizer))


def _differences(plan: AbstractModel, found: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
  """What a plan has that was not found, what was found that it has not, and what is of another size, each in words.

  Raises:
    UserError: another size of what has no part that could be taken.
  """
  words = []
  for name, shape in plan.shapes.items():
    if name in found and found[name].shape != shape.shape:
      words.append(f'{name} {list(found[name].shape)} for {list(shape.shape)}')
      if found[name].ndim != shape.ndim or any(
          ours != theirs and not _resized(axis) for ours, theirs, axis in zip(shape.shape, found[name].shape, plan.axes[name])):
        raise UserError('init_from', words[-1], 'the same sizes but for vocabulary, positions and number of layers')
  words += [f'no {name}' for name in plan.shapes if name not in found]
  return words + [f'{name} left out' for name in found if name not in plan.shapes]


def _resized(axis: Axis) -> bool:
  return (axis[0] if isinstance(axis, tuple) else axis) in _RESIZED


def _taken(fresh: jax.Array, found: jax.Array | None) -> jax.Array:
  """A parameter with what was found of it."""
  if found is None:
    return fresh
  if found.shape == fresh.shape:
    return jax.device_put(found, fresh.sharding)
  part = tuple(slice(min(sizes)) for sizes in zip(fresh.shape, found.shape))

  @jax.jit
  def combine(fresh, found):
    whole, other = (jax.reshard(x, PartitionSpec()) for x in (fresh, found))  # parts of a split axis would have to move
    return jax.reshard(whole.at[part].set(other[part]), jax.typeof(fresh).sharding.spec)

  return combine(fresh, found)


def _listed(words: list[str]) -> str:
  return '; '.join(words[:6]) + (f' and {len(words) - 6} more' if len(words) > 6 else '')
