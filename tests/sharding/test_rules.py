"""The table from logical to mesh axes, and what each stage of ZeRO shards."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig
from gptjax.model import abstract_model
from gptjax.sharding import RULES, make_mesh, parameter_specs, put_rows, spec, unsharded_axes
from gptjax.training import abstract, initializer, make_optimizer


@pytest.mark.parametrize('axes, expected', [
    ((), P()),
    ((None, None, 'vocab'), P(None, None, 'model')),
    (('vocab', 'embed'), P('model', None)),
    (('positions', 'embed'), P(None, None)),
    (('embed', 'heads'), P(None, 'model')),
    (('heads', 'embed'), P('model', None)),
    (('layers', 'embed', 'mlp'), P(None, None, 'model')),
    (('layers', 'head_width'), P(None, None)),
])
def test_a_logical_axis_is_split_as_the_table_says(axes, expected):
  assert spec(*axes, mesh=make_mesh(MeshConfig(4, 2))) == expected


def test_an_axis_the_table_does_not_know_is_an_error():
  with pytest.raises(KeyError):
    spec('width')


@pytest.mark.parametrize('axes, shape, expected', [
    (('embed', 'mlp'), (64, 256), P('data', 'model')),
    (('mlp', 'embed'), (256, 64), P(('model', 'data'), None)),  # the first axis
    (('mlp', 'embed'), (252, 64), P('model', 'data')),  # 8 devices do not divide 252
    (('positions', 'embed'), (64, 1024), P('data', None)),
    (('positions', 'embed'), (1022, 64), P(None, 'data')),  # 4 devices do not divide 1022
    (('positions', 'embed'), (1022, 62), P(None, None)),
    (('layers', 'embed', 'heads'), (1024, 64, 32), P(None, 'data', 'model')),  # never the layers
    (('layers', 'heads'), (1024, 64), P(None, ('model', 'data'))),  # no other axis
    (('layers', 'heads'), (1024, 60), P(None, 'model')),
    (('embed',), (64,), P('data')),
    (('embed', ('mlp', 33)), (64, 33), P('data', None)),  # model does not divide 33
    (('embed', ('mlp', 36)), (64, 36), P('data', 'model')),
    (('embed', ('kv_heads', 3)), (64, 48), P('data', None)),  # 3 heads stay together, though 2 divides 48
])
def test_the_first_dimension_that_divides_is_sharded(axes, shape, expected):
  mesh = make_mesh(MeshConfig(4, 2))
  unsharded = spec(*axes, mesh=mesh)
  for stage, converted in itertools.product(range(4), (False, True)):
    found = parameter_specs(axes, shape, stage, converted, mesh)
    assert found.compute == unsharded
    assert found.optimizer == (expected if stage >= 1 else unsharded)
    assert found.gradient == (expected if stage >= 2 else unsharded)
    assert found.stored == (expected if stage == 3 or (converted and stage) else unsharded)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['layers', 'vocab', 'heads', 'mlp', 'embed', 'positions', 'head_width']),
                          st.integers(1, 512)),
                min_size=1, max_size=3, unique_by=lambda pair: RULES[pair[0]] or pair[0]),
       st.sampled_from([1, 2, 3, 4]))
def test_data_is_added_at_most_once_and_only_where_it_may(pairs, data):
  axes, shape = zip(*pairs, strict=True)
  mesh = make_mesh(MeshConfig(data, 2))
  stored = parameter_specs(axes, shape, 3, False, mesh).stored
  changed = [i for i in range(len(axes)) if stored[i] != spec(*axes, mesh=mesh)[i]]
  parts = {i: 2 * data if RULES[axis] else data for i, axis in enumerate(axes) if axis != 'layers'}
  fitting = [i for i in parts if shape[i] % parts[i] == 0]
  assert changed == (fitting[:1] if data > 1 else [])
  assert all(stored[i] == (('model', 'data') if RULES[axes[i]] else 'data') for i in changed)
  assert unsharded_axes(axes, shape, 3, mesh).keys() == ({'data'} if data > 1 and not fitting else set())


def test_sizes_that_the_mesh_does_not_divide_are_reported():
  mesh = make_mesh(MeshConfig(4, 2))
  assert unsharded_axes(('embed', ('mlp', 33)), (64, 33), 0, mesh) == {'model': 33}
  assert unsharded_axes(('embed', ('kv_heads', 3)), (66, 48), 1, mesh) == {'model': 3}  # data takes the other axis
  assert unsharded_axes(('layers', 'embed', ('mlp', 33)), (2, 66, 33), 2, mesh) == {'model': 33, 'data': 66}
  assert unsharded_axes(('embed', ('mlp', 36)), (64, 36), 3, mesh) == {}


def test_each_row_is_put_on_its_device(mesh):
  rows = np.arange(16 * 3).reshape(16, 3)
  placed = put_rows(mesh, {'tokens': rows}, 16)['tokens']
  np.testing.assert_array_equal(placed, rows)
  for shard in placed.addressable_shards:
    assert shard.data.shape == (16 // mesh.shape['data'], 3)
    np.testing.assert_array_equal(shard.data, rows[shard.index])


@pytest.mark.parametrize('data', [2, 4, 8])
@pytest.mark.parametrize('scan', [False, True])
def test_bytes_of_a_device_are_the_papers(scan, data):
  """Parameters, gradients and Adam's moments in float32 (arXiv:1910.02054, figure 1, with 4 + 4 + 8 bytes per parameter)."""
  model = ModelConfig(layers=2, width=64, heads=8, vocab_size=256)
  mesh = make_mesh(MeshConfig(data, 1))
  parts = lambda sharding, shape: math.prod(sharding.shard_shape(shape))
  with jax.set_mesh(mesh):
    described = abstract_model(model, ComputeConfig(scan=scan), 64)
    count = sum(math.prod(shape.shape) for shape in described.shapes.values())
    for stage, expected in enumerate((16, 8 + 8 / data, 4 + 12 / data, 16 / data)):
      optimizer = make_optimizer(OptimizerConfig())
      state = abstract(initializer(described, optimizer, stage, mesh, 0), mesh)
      held = 4 * sum(parts(x.sharding, x.shape) for x in jax.tree.leaves((state.trained, state.optimizer)))
      held += 4 * sum(parts(jax.NamedSharding(mesh, spec.gradient), described.shapes[name].shape)
                      for name, spec in described.specs(stage, mesh).items())
      assert held / count == pytest.approx(expected, rel=0.01), stage
