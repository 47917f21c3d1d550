"""Names of machines, and the links of their mesh axes."""

import pytest

from gptjax.config import MeshConfig, UserError
from gptjax.planning import parse
from gptjax.planning.topology import EXAMPLES
from gptjax.sharding.chips import CHIPS


@pytest.mark.parametrize('name, devices, groups', [
  ('v5p:4x4x4', 64, 1), ('v5p:4x4x4*2', 128, 2), ('v5e:1x1', 1, 1), ('v4:2x2x1', 4, 1), ('tpu7x:2x2x2', 16, 1), ('h100:8', 8, 1),
  ('h100:8x16', 128, 16)])
def test_names_of_machines(name, devices, groups):
  topology = parse(name)
  assert (topology.devices, topology.groups, topology.name) == (devices, groups, name)


def test_all_shapes_that_are_suggested_are_accepted():
  for name, chip in CHIPS.items():
    for shape in EXAMPLES[chip.axes].split(', ') if chip.is_tpu else ('8', '8x16'):
      assert parse(f'{name}:{shape}').chips >= 1


@pytest.mark.parametrize('name, message', [
  (None, 'CHIP:SHAPE'), ('', 'CHIP:SHAPE'), ('v5p', 'CHIP:SHAPE'), ('v5e:0x2', 'CHIP:SHAPE'), ('v5q:2x2x1', 'did you mean v5[pe]:2x2x1'),
  ('v5p:4x4', '3 sizes.*4x4x4'), ('v5p:3x3x3', 'first two even'), ('v5p:1x1x1', 'first two even'), ('v5e:32x32', '256 chips'),
  ('h100:8x2x2', 'GPUs per node'), ('h100:8*2', 'GPUs per node')])
def test_an_invalid_name_is_an_error(name, message):
  with pytest.raises(UserError, match=message):
    parse(name)


@pytest.mark.parametrize('name, mesh, sizes', [
  ('v5p:4x4x4', MeshConfig(), (1, 64, 1)), ('v5p:4x4x4', MeshConfig(16, 4), (1, 16, 4)), ('v5p:4x4x4*2', MeshConfig(-1, 4, 2), (2, 16, 4)),
  ('h100:8x16', MeshConfig(-1, 8, 16), (16, 1, 8))])
def test_meshes_take_all_devices(large, name, mesh, sizes):
  object.__setattr__(large, 'mesh', mesh)
  replica, data, model = sizes
  assert parse(name).mesh_sizes(large) == MeshConfig(data, model, replica).sizes


@pytest.mark.parametrize('name, mesh, field', [
  ('v5p:4x4x4', MeshConfig(16, 2), 'mesh.data'), ('v5p:4x4x4', MeshConfig(-1, 3), 'mesh.model'),
  ('v5p:4x4x4*2', MeshConfig(), 'mesh.replica'), ('h100:8', MeshConfig(-1, 2, 8), 'mesh.replica')])
def test_a_mesh_that_does_not_match_is_an_error(large, name, mesh, field):
  object.__setattr__(large, 'mesh', mesh)
  with pytest.raises(UserError, match=field):
    parse(name).mesh_sizes(large)


def links(name, replica, data, model):
  found = parse(name).links(MeshConfig(replica=replica, data=data, model=model).sizes)
  return {axis: (found[axis].network.partition(' (')[0], found[axis].bandwidth / 1e9) for axis in ('replica', 'data', 'model')}


def test_a_mesh_axis_has_the_rings_of_the_torus_axes_it_covers():
  found = links('v5p:4x4x4', 1, 16, 4)
  assert found['model'] == ('ICI', 200) and found['data'] == ('ICI', 400)
  assert links('v5p:4x4x4', 1, 64, 1)['data'] == ('ICI', 600)
  assert links('v5e:4x4', 1, 16, 1)['data'] == ('ICI', 100)  # lines, since only 16 chips in a row close
  assert links('v5e:16x16', 1, 256, 1)['data'] == ('ICI', 200)
  half = links('v5e:16x16', 1, 128, 2)
  assert half['model'] == ('ICI', 50) and half['data'] == ('ICI', 150)
  assert links('v5p:4x4x4*2', 2, 64, 1)['replica'] == ('data-centre network', 6.25)


def test_an_axis_of_gpus_has_nvlink_within_a_node_and_the_ports_of_all_its_gpus_beyond():
  found = links('h100:8x16', 1, 16, 8)
  assert found['model'] == ('NVLink', 450) and found['data'] == ('InfiniBand', 50)
  assert links('h100:8x16', 1, 128, 1)['data'] == ('InfiniBand', 400)
  assert links('h100:8x16', 16, 4, 2) == {'model': ('NVLink', 450), 'data': ('NVLink', 450), 'replica': ('InfiniBand', 50)}
