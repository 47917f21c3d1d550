"""The smallest batches, steps and runs; what the tests of training, checkpoints, evaluation and commands share."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import subprocess
import zlib

import jax
import numpy as np
import pytest

from gptjax import config as configs
from gptjax.config import (
  ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, PipelineConfig, SourceConfig, TokenizerConfig)
from gptjax.model import model_of
from gptjax.sharding import put_rows
from gptjax.training.replaying import CLOCK
from gptjax.training import Options, abstract, initializer, learning_rates, make_optimizer, next_token, train, train_step

DURATIONS = {'steps': 100, 'warmup': 2, 'decay': 0}
NO_RATES = lambda count: {}  # for optimizers of optax, which have their own; one object, so that equal steps are compiled once
WALL_CLOCK = CLOCK
"""Fields of metrics.jsonl that two equal runs need not share."""


def batch(rows=8, context=16, vocab=50, seed=0):
  """Random rows of several documents each; some rows have few targets that count, others many."""
  rng = np.random.default_rng(seed)
  begins = rng.random((rows, context)) < 0.15
  begins[:, 0] = True
  here = np.arange(context, dtype=np.int32)
  share = rng.permutation(np.linspace(0.1, 0.9, rows))[:, None]
  return {
    'tokens': rng.integers(4, vocab, (rows, context), np.int32),
    'targets': rng.integers(4, vocab, (rows, context), np.int32),
    'positions': here - np.maximum.accumulate(np.where(begins, here, 0), axis=1),
    'segments': np.cumsum(begins, axis=1, dtype=np.int32),
    'mask': (rng.random((rows, context)) < share).astype(np.float32),
  }


def put(rows):
  """A batch on the mesh in force."""
  mesh = jax.sharding.get_mesh()
  return put_rows(mesh, rows, len(rows['tokens']))


def drawn_state(described, initialize, mesh):
  """The state that `initialize` makes, but with parameters drawn on the host by their names: nothing is compiled for it."""
  def value(name, layer_shape):
    if not name or name.endswith(('bias', 'balance')):
      return np.zeros(layer_shape, np.float32)
    if name.endswith('gain'):
      return np.ones(layer_shape, np.float32)
    return 0.02 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(layer_shape, np.float32)

  state = abstract(initialize, mesh)
  parameters = {}
  for name in state.parameters:
    names, shape = described._names(name), described.shapes[name].shape
    stacked = 'layers' in described.axes[name]
    parameters[name] = np.stack([value(one, shape[1:]) for one in names]) if stacked else value(names[0], shape)
  host = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)  # moments and statistics begin with zeros
  host = host._replace(**{role: {name: parameters[name] for name in getattr(state, role)} for role in ('trained', 'frozen')})
  return jax.device_put(host, jax.tree.map(lambda leaf: leaf.sharding, state))


def trainer(model, optimizer=None, *, compute=ComputeConfig(), context=16, zero_stage=0, microbatches=1, seed=0, z_loss=0.0,
            frozen=(), pipeline=PipelineConfig(), objective=None, drawn=True, gradient_noise=False):
  """(fresh state, train step) on the mesh in force; `optimizer` is a config or one of optax's, `objective` by default next_token.

  The initial parameters are `drawn_state`'s, or those of a run of seed 0, whatever `seed`.
  """
  if optimizer is None or isinstance(optimizer, OptimizerConfig):
    settings = optimizer or OptimizerConfig()
    optimizer, rates = make_optimizer(settings, model.width_ratio), learning_rates(settings, **DURATIONS)
  else:
    rates = NO_RATES
  mesh = jax.sharding.get_mesh()
  described = model_of(Config(model=model, compute=compute, data=DataConfig(context=context), pipeline=pipeline,
                              mesh=MeshConfig(**mesh.shape)))
  initialize = initializer(described, optimizer, zero_stage, mesh, 0, described.matching('frozen', frozen))
  state = drawn_state(described, initialize, mesh) if drawn else initialize()
  return state, train_step(described, objective or next_token(z_loss), optimizer, rates, zero_stage=zero_stage, mesh=mesh,
                           microbatches=microbatches, seed=seed, pipeline=pipeline, gradient_noise=gradient_noise)


def write_text(path, sentences=300, seed=0):
  """Writes some sentences of small words, a line each; returns the path."""
  rng = random.Random(seed)
  words = 'a lazy dog and the quick brown fox jump over old warm stoves while small cats sleep'.split()
  path.write_text(''.join(' '.join(rng.choices(words, k=8)) + '.\n' for _ in range(sentences)))
  return path


def config(text, **values):
  """The config of a run of 8 steps on a text file; `values` are dotted names with __ for the dot."""
  base = Config(
    model=ModelConfig(layers=1, heads=2, width=16),
    data=DataConfig(source=SourceConfig(str(text)), context=16, tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(peak_lr=1e-2, warmup=2), mesh=configs.MeshConfig(data=1),
    eval=EvalConfig(every=4, rows=8, sample_tokens=0), steps=8, batch_size=4)
  return configs.override(base, {name.replace('__', '.'): value for name, value in values.items()})


def options(workdir, cache, **values):
  """Options that log every step."""
  return dataclasses.replace(Options(pathlib.Path(workdir), pathlib.Path(cache), log_every=1), **values)


def run(settings, workdir, cache, **values):
  """Trains, and returns the records of metrics.jsonl."""
  train(settings, options(workdir, cache, **values))
  return records(workdir)


def records(workdir, name='metrics.jsonl'):
  """A JSONL file's records without what depends on the clock."""
  lines = [json.loads(line) for line in (pathlib.Path(workdir) / name).read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines]


def files_below(folder):
  """Paths of all files and folders below a folder, relative to it."""
  return sorted(os.path.relpath(os.path.join(root, name), folder)
                for root, folders, files in os.walk(folder) for name in (*folders, *files))


@contextlib.contextmanager
def small_disk(folder, size):
  """Mounts a file system of a few bytes on a new folder; skips the test where that is not allowed."""
  folder.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder]
  if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('only root may mount a small disk')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '--lazy', folder], check=True)
