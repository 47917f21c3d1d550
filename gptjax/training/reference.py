"""Log-probabilities of a reference: computed once for all rows of a run, and kept in its workdir beside the reference itself."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.data import Column, EvalRows, Packed, ProgressBar
from gptjax.distributed import broadcast, is_primary
from gptjax.files import atomic_file
from gptjax.inference.forward import dispatch_ahead, forward
from gptjax.model import AbstractModel, Parameters, Positions
from gptjax.sharding import BATCH_SPEC, padded_batch_size, process_rows, put_rows
from gptjax.training.run import Run
from gptjax.training.workdir import REFERENCE, Source

COLUMNS = 'log_probabilities'
"""Folder of a workdir with a file per set of rows."""


def add_references(run: Run, workdir: Path) -> None:
  """Gives the rows of a run the column that its objective needs, from files in the workdir, which are made first where they are missing."""
  if not run.config.objective.needs_reference:
    return
  isolate = run.config.data.isolate_documents
  rows = [*(EvalRows.of(layout, isolate) for layout in run.rows.layouts), *run.valid.values()]
  folder, standard = workdir / COLUMNS, run.standard
  if not all((folder / _file(one)).exists() for one in rows):
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
                  batch_size: int) -> None:
  """Writes the log-probability of each target under the parameters, 0 where the mask is; in nats. All processes must call this."""
  compute, size = _log_probabilities(model, mesh, zero_stage), padded_batch_size(mesh, batch_size)
  mine = process_rows(mesh, size)
  for one in {_file(one): one for one in rows}.values():
    if broadcast('column', (folder / _file(one)).exists()):
      continue
    starts = range(0, one.count, size)
    batches = (compute(parameters, put_rows(mesh, one.batch(start + mine), size)) for start in starts)
    with ProgressBar('reference', one.count, 'rows', shown=is_primary()) as progress:
      found = []
      for values in dispatch_ahead(batches):
        found.append(np.asarray(values))
        progress.advance(size)
    if is_primary():
      folder.mkdir(exist_ok=True)
      with atomic_file(folder / _file(one)) as partial:
        np.concatenate(found)[:one.count].tofile(partial)
    broadcast('column is written')


@functools.lru_cache(maxsize=4)
def _log_probabilities(model: AbstractModel, mesh: Mesh, zero_stage: int) -> Callable:
  """The jitted function (parameters, batch) -> log-probabilities of targets [B, T], complete on every device."""
  def local(module, batch):
    hidden = module.hidden(batch['tokens'], Positions(batch['positions'], batch['segments']))[0]
    found, _ = module.head.log_probabilities(hidden, batch['targets'].reshape(-1))
    return found.reshape(batch['mask'].shape) * (batch['mask'] > 0)

  compute = forward(model, mesh, zero_stage, local, (BATCH_SPEC,), BATCH_SPEC)
  return jax.jit(lambda parameters, batch: jax.reshard(compute(parameters, batch), PartitionSpec()))
