"""Log-probabilities of a reference: computed once for all rows of a run, and kept in its workdir beside the reference itself."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.checkpoint import REFERENCE
from gptjax.data import Batch, Column, EvalRows, Packed, ProgressBar
from gptjax.distributed import broadcast, is_primary
from gptjax.files import atomic_file
from gptjax.inference.forward import dispatch_ahead, forward
from gptjax.model import AbstractModel, Parameters, Positions
from gptjax.sharding import BATCH_SPEC, padded_batch_size, process_rows, put_rows
from gptjax.training.run import Run
from gptjax.training.workdir import COLUMNS, Source

def add_references(run: Run, workdir: Path) -> None:
  """Gives the rows of a run the column that its objective needs, from files in the workdir, which are made first where they are missing."""
  if run.config.objective.kind != 'preference' or not run.config.objective.needs_reference:
    return
  isolate = run.config.data.isolate_documents
  rows = [*(EvalRows.of(layout, isolate) for layout in run.rows.layouts), *run.valid.values()]
  folder, standard = workdir / COLUMNS, run.standard
  if not broadcast('columns', all((folder / _file(one)).exists() for one in rows)):
    with jax.set_mesh(standard.mesh):
      parameters = Source(workdir / REFERENCE).parameters(run, merged=True)
      write_columns(folder, rows, parameters, standard.model.base, standard.mesh, 3, run.config.microbatch_size)
  use_columns(folder, rows)


def _file(rows: EvalRows) -> str:
  assert isinstance(rows.layout, Packed)
  return f'{rows.layout.name}.float32'


def use_columns(folder: Path, rows: Iterable[EvalRows]) -> None:
  """Gives rows the columns in a folder."""
  for one in rows:
    assert isinstance(one.layout, Packed)
    one.layout.column = Column(folder / _file(one), one.count, one.context)


def write_columns(folder: Path, rows: Iterable[EvalRows], parameters: Parameters, model: AbstractModel, mesh: Mesh, zero_stage: int,
                  batch_size: int, shared: bool = True) -> None:
  """Writes the log-probability of each target under the parameters, 0 where the mask is; in nats. All processes must call this; process 0
  alone writes to a folder that is `shared`."""
  for one in {_file(one): one for one in rows}.values():
    if broadcast('column', (folder / _file(one)).exists()):
      continue
    with ProgressBar('reference', one.count, 'rows', shown=is_primary()) as progress:
      found = [*_computed(one.batch, one.count, parameters, model, mesh, zero_stage, batch_size, progress.advance)]
    if is_primary() or not shared:
      folder.mkdir(exist_ok=True)
      with atomic_file(folder / _file(one)) as partial:
        np.concatenate(found).tofile(partial)
    broadcast('column is written')


def reference_of(run: Run, workdir: Path) -> Callable[[Batch], np.ndarray]:
  """A function from rows, which all processes have, to the log-probabilities of their targets under the reference of a run [n, T]."""
  standard = run.standard
  with jax.set_mesh(standard.mesh):
    parameters = Source(workdir / REFERENCE).parameters(run, merged=True)

  def compute(rows: Batch) -> np.ndarray:
    count = len(rows['tokens'])
    names = ('tokens', 'targets', 'mask', 'positions', 'segments')
    part = lambda numbers: {name: rows[name][np.minimum(numbers, count - 1)] for name in names}
    with jax.set_mesh(standard.mesh):
      return np.concatenate([*_computed(part, count, parameters, standard.model.base, standard.mesh, 3, run.config.microbatch_size)])
  return compute


def _computed(rows: Callable[[np.ndarray], Batch], count: int, parameters: Parameters, model: AbstractModel, mesh: Mesh, zero_stage: int,
              batch_size: int, advance: Callable[[int], None] = lambda rows: None) -> Iterator[np.ndarray]:
  """Log-probabilities of the targets of rows 0 to count - 1, some rows at a time."""
  compute, size = _log_probabilities(model, mesh, zero_stage), padded_batch_size(mesh, batch_size)
  mine, starts = process_rows(mesh, size), range(0, count, size)
  found = dispatch_ahead(compute(parameters, put_rows(mesh, rows(start + mine), size)) for start in starts)
  for start, values in zip(starts, found, strict=True):
    yield np.asarray(values)[:count - start]
    advance(min(size, count - start))


@functools.lru_cache(maxsize=4)
def _log_probabilities(model: AbstractModel, mesh: Mesh, zero_stage: int) -> Callable:
  """The jitted function (parameters, batch) -> log-probabilities of targets [B, T], complete on every device."""
  def local(module, batch):
    hidden = module.hidden(batch['tokens'], Positions(batch['positions'], batch['segments']))[0]
    found, _ = module.head.log_probabilities(hidden, batch['targets'].reshape(-1))
    return found.reshape(batch['mask'].shape) * (batch['mask'] > 0)

  compute = forward(model, mesh, zero_stage, local, (BATCH_SPEC,), BATCH_SPEC)
  return jax.jit(lambda parameters, batch: jax.reshard(compute(parameters, batch), PartitionSpec()))
