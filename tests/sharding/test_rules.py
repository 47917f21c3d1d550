"""The table from logical to mesh axes, and what ZeRO stage 3 shares out."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.model import blueprint
from gptjax.sharding import RULES, make_mesh, place, spec, stored_spec
from gptjax.sharding.rules import SMALLEST_SHARDED


@pytest.mark.parametrize('axes, expected', [
    ((), P()),
    (('batch', None), P(('replica', 'data'), None)),
    (('batch', None, 'vocab'), P(('replica', 'data'), None, 'model')),
    (('vocab', 'embed'), P('model', None)),
    (('positions', 'embed'), P(None, None)),
    (('embed', 'heads'), P(None, 'model')),
    (('heads', 'embed'), P('model', None)),
    (('layers', 'embed', 'mlp'), P(None, None, 'model')),
    (('layers', 'head_width'), P(None, None)),
])
def test_a_logical_axis_lies_where_the_table_says(axes, expected):
  assert spec(*axes) == expected


def test_an_axis_the_table_does_not_know_is_an_error():
  with pytest.raises(KeyError):
    spec('width')


@pytest.mark.parametrize('axes, shape, expected', [
    (('embed', 'mlp'), (64, 256), P('data', 'model')),
    (('mlp', 'embed'), (256, 64), P('model', 'data')),
    (('positions', 'embed'), (1024, 64), P('data', None)),  # the largest free axis
    (('positions', 'embed'), (64, 1024), P(None, 'data')),
    (('positions', 'embed'), (1022, 64), P(None, 'data')),  # 4 devices do not divide 1022
    (('positions', 'embed'), (1022, 62), P(None, None)),
    (('layers', 'embed', 'heads'), (1024, 64, 32), P(None, 'data', 'model')),  # never the layers
    (('layers', 'heads'), (1024, 64), P(None, 'model')),
    (('embed',), (SMALLEST_SHARDED,), P('data')),
    (('embed',), (SMALLEST_SHARDED - 4,), P(None)),  # too small to be worth gathering
])
def test_stage_3_shares_out_the_largest_free_axis_that_divides(axes, shape, expected):
  mesh = make_mesh(MeshConfig(4, 2))
  assert stored_spec(axes, shape, 3, mesh) == expected
  assert stored_spec(axes, shape, 0, mesh) == spec(*axes)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['layers', 'vocab', 'heads', 'mlp', 'embed', 'positions', 'head_width']),
                          st.integers(1, 512)),
                min_size=1, max_size=3, unique_by=lambda pair: RULES[pair[0]] or pair[0]),
       st.sampled_from([1, 2, 3, 4]))
def test_stage_3_adds_data_at_most_once_and_only_where_it_may(pairs, data):
  axes, shape = zip(*pairs, strict=True)
  stored = stored_spec(axes, shape, 3, make_mesh(MeshConfig(data, 2)))
  changed = [i for i in range(len(axes)) if stored[i] != spec(*axes)[i]]
  free = [i for i in range(len(axes)) if axes[i] in ('embed', 'positions', 'head_width') and shape[i] % data == 0]
  assert bool(changed) == bool(free and math.prod(shape) >= SMALLEST_SHARDED)
  for i in changed:
    assert changed == [i] and stored[i] == 'data' and i in free and shape[i] == max(shape[j] for j in free)


def test_place_puts_each_row_on_its_device(mesh):
  rows = np.arange(16 * 3).reshape(16, 3)
  placed = place(mesh, {'tokens': rows}, 'batch', None)['tokens']
  np.testing.assert_array_equal(placed, rows)
  for shard in placed.addressable_shards:
    assert shard.data.shape == (16 // mesh.shape['data'], 3)
    np.testing.assert_array_equal(shard.data, rows[shard.index])


@pytest.mark.parametrize('mesh', ['8x1', '4x2'], indirect=True)
@pytest.mark.parametrize('scan', [False, True])
def test_a_device_holds_its_share_of_the_parameters(style, scan, mesh, random_parameters):
  plan = blueprint(dataclasses.replace(style, scan=scan, width=64), 16)
  whole = sum(4 * math.prod(shape.shape) for shape in plan.shapes.values())
  small = sum(4 * math.prod(shape.shape) for shape in plan.shapes.values() if math.prod(shape.shape) < SMALLEST_SHARDED)

  def bytes_a_device(zero_stage):
    held = dict.fromkeys(mesh.devices.flat, 0)
    for value in random_parameters(plan, zero_stage).values():
      for shard in value.addressable_shards:
        held[shard.device] += shard.data.nbytes
    assert len(set(held.values())) == 1
    return held.popitem()[1]

  # At stage 3 all but the small parameters, which model may halve, are spread over all eight devices.
  shared = bytes_a_device(3)
  assert (whole - small) / 8 <= shared <= (whole - small) / 8 + small
  if mesh.shape['model'] == 1:
    assert bytes_a_device(0) == whole
    assert shared == (whole - small) / 8 + small
  else:
    assert whole / 2 < bytes_a_device(0) < 0.6 * whole
