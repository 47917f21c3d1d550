"""How devices are arranged, and what they share out, changes neither the losses nor the gradient norms of a run."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiers import full
from tiny import batch, put, trainer

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig, RouterConfig
from gptjax.sharding import make_mesh

STEPS = 6
ODD = ModelConfig(layers=2, width=32, heads=8, kv_heads=2, mlp_width=43, vocab_size=51, vocab_multiple=1, positions='rope', norm='rmsnorm',
                  mlp='swiglu', bias=False, tied=False, dropout=0.1, mup_base=16)
"""Its vocabulary, its feed-forward width and, from 4 devices on, its key heads do not divide."""

EXPERTS = ModelConfig(layers=2, width=32, heads=8, kv_heads=2, vocab_size=51, vocab_multiple=1, positions='rope', norm='rmsnorm',
                      mlp='swiglu', bias=False, experts=8, experts_per_token=2, expert_width=22, shared_experts=1,
                      router=RouterConfig(bias=True, balance_loss=0.01, z_loss=1e-3))
LAYOUTS = {'8x1': (MeshConfig(8, 1), 1), '4x2': (MeshConfig(4, 2), 2), '2x4': (MeshConfig(2, 4), 3), '1x8': (MeshConfig(1, 8), 2),
           '2x2x2': (MeshConfig(2, 2, replica=2), 3), '4x1x2': (MeshConfig(4, 1, replica=2), 0),
           'context 2': (MeshConfig(2, 2, context=2), 3), 'context 4': (MeshConfig(1, 2, context=4), 1),
           'context 4, 2x1': (MeshConfig(2, 1, context=4), 0), 'context 2, 4x1': (MeshConfig(4, 1, context=2), 2),
           '2x2 expert 2': (MeshConfig(2, 2, expert=2), 3), '1x2 expert 4': (MeshConfig(1, 2, expert=4), 1),
           '2x1 expert 4': (MeshConfig(2, 1, expert=4), 2), '4x1 expert 2': (MeshConfig(4, 1, expert=2), 0)}
"""Meshes and ZeRO stages; the bar `stages` follows all of them on all meshes."""


def follow(model, compute, optimizer, mesh, zero_stage, microbatches=4):
  """Losses and gradient norms of some steps [STEPS, 2], and the share of the state that the first device holds."""
  with jax.set_mesh(make_mesh(mesh)):
    settings = OptimizerConfig(name=optimizer, peak_lr=1e-2, clip=0.5)
    # Experts learn too slowly from drawn parameters for the bar below.
    state, step = trainer(model, settings, compute=compute, zero_stage=zero_stage, microbatches=microbatches, z_loss=1e-3,
                          drawn=not model.experts)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]
    first = jax.devices()[0]
    held = sum(math.prod(s.data.shape) for leaf in arrays for s in leaf.addressable_shards if s.device == first)
    figures = []
    for seed in range(STEPS):
      state, metrics = step(state, put(batch(32, seed=seed % 2)))
      figures.append([metrics['loss'], metrics['grad_norm']])
    return np.array(figures, np.float64), held / sum(leaf.size for leaf in arrays)


def windowed(model):
  """The model with a window and capped scores; every other layer is global."""
  return dataclasses.replace(model, window=5, global_every=2, attention_cap=3.0)


SPLIT = ComputeConfig(scan=True, sequence_parallel=True, remat='names', saved=('q', 'k'), offloaded=('block',))
# Without biases: those of keys have a gradient of rounding alone, which Adam scales to full steps; test_meshes compares biases.
UNROLLED = dataclasses.replace(ODD, tied=True, positions='learned', norm='layernorm')
CONTEXTS = [name for name in LAYOUTS if name.startswith('context')]
CASES = [
  pytest.param(ODD, SPLIT, 'adamw', 1e-5, ['context 2'], id='tokens split'),
  full(ODD, SPLIT, 'adamw', 1e-5, ['2x2x2', '4x2', '2x4'], id='tokens split, other layouts'),
  full(UNROLLED, ComputeConfig(), 'adamw', 1e-5, ['8x1', '4x1x2'], id='unrolled'),
  full(ODD, ComputeConfig(scan=True, remat='dots'), 'muon', 1e-4, ['1x8'], id='muon'),
  full(ODD, ComputeConfig(), 'lion', 1e-5, ['2x2x2', '4x2', '2x4'], id='lion'),
  full(windowed(ODD), SPLIT, 'adamw', 1e-5, CONTEXTS, id='ring'),
  full(windowed(ODD), ComputeConfig(scan=True, remat='full', context_attention='all_gather'), 'adamw', 1e-5, CONTEXTS, id='all_gather'),
  full(UNROLLED, ComputeConfig(), 'adamw', 1e-5, CONTEXTS, id='ring, unrolled'),
  full(ODD, ComputeConfig(scan=True, remat='dots'), 'muon', 1e-4, CONTEXTS, id='ring, muon'),
  full(EXPERTS, ComputeConfig(), 'adamw', 1e-5, ['1x2 expert 4', '4x1 expert 2'], id='experts'),
  full(EXPERTS, SPLIT, 'adamw', 1e-5, ['2x2 expert 2', '2x1 expert 4'], id='experts, tokens split'),
  full(dataclasses.replace(EXPERTS, expert_every=2), ComputeConfig(), 'muon', 1e-4, ['2x2 expert 2', '8x1'], id='experts in some layers')]


@pytest.mark.parametrize('model, compute, optimizer, tolerance, layouts', CASES)
def test_losses_are_those_of_one_device_and_one_microbatch(model, compute, optimizer, tolerance, layouts):
  one, held = follow(model, compute, optimizer, MeshConfig(1, 1), 0, microbatches=1)
  assert held == 1 and one[0, 0] - one[-2, 0] > 0.2  # it learns
  for mesh, zero_stage in map(LAYOUTS.__getitem__, layouts):
    figures, held = follow(model, compute, optimizer, mesh, zero_stage)
    np.testing.assert_allclose(figures, one, rtol=tolerance, err_msg=f'{mesh}, ZeRO {zero_stage}')
    assert held == 1 if zero_stage == 0 and mesh.expert == 1 else held < (1.0 if zero_stage < 3 else 0.7)


HALF = dataclasses.replace(ODD, dropout=0.0), ComputeConfig(scan=True, dtype='bfloat16'), 'adamw', MeshConfig(4, 1)


@pytest.fixture(scope='module')
def unsharded():
  """The figures where every device has all parameters."""
  return follow(*HALF, 0)[0]


@pytest.mark.parametrize('zero_stage', [full(1), full(2), 3])
def test_a_shard_gathered_in_bfloat16_computes_what_the_complete_parameter_does(zero_stage, unsharded):
  # What is exchanged are roundings of other values: the float32 original is sharded.
  figures, held = follow(*HALF, zero_stage)
  np.testing.assert_allclose(figures, unsharded, rtol=1e-3)
  assert held < 0.3
