"""The mesh takes the devices there are, or says which sizes they allow."""

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from gptjax.config import Config, MeshConfig, ModelConfig, UserError
from gptjax.sharding import check_sizes, make_mesh


@pytest.mark.parametrize('data, model, sizes', [
    (-1, 1, (8, 1)), (-1, 2, (4, 2)), (-1, 8, (1, 8)), (8, 1, (8, 1)), (4, 2, (4, 2)), (2, 4, (2, 4)),
    (1, 1, (1, 1)), (3, 2, (3, 2)), (2, 3, (2, 3)), (5, 1, (5, 1)),  # fewer than there are
])
def test_a_mesh_has_the_sizes_asked_for_as_explicit_axes(data, model, sizes):
  mesh = make_mesh(MeshConfig(data, model))
  assert tuple(mesh.shape.items()) == (('replica', 1), ('data', sizes[0]), ('model', sizes[1]))
  assert mesh.axis_types == (AxisType.Explicit,) * 3
  assert set(mesh.devices.flat) == set(jax.devices()[:sizes[0] * sizes[1]])


@pytest.mark.parametrize('data, model, message', [
    (-1, 3, 'mesh.model: 3, accepted: a divisor of the 8 devices: 1, 2, 4, 8'),
    (-1, 16, 'mesh.model: 16, accepted: a divisor of the 8 devices: 1, 2, 4, 8'),
    (1, 9, 'mesh.model: 9, accepted: a divisor of the 8 devices: 1, 2, 4, 8'),
    (9, 1, 'mesh.data: 9, accepted: -1 or at most 8 with 8 devices and mesh.model=1'),
    (3, 4, 'mesh.data: 3, accepted: -1 or at most 2 with 8 devices and mesh.model=4'),
])
def test_devices_that_do_not_suffice_or_divide_are_refused(data, model, message):
  with pytest.raises(UserError) as caught:
    make_mesh(MeshConfig(data, model))
  assert str(caught.value) == message


def test_several_processes_leave_no_device_out(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match=r'^mesh\.data: 2, accepted: all 8 devices .*: mesh\.data=4$'):
    make_mesh(MeshConfig(2, 2))
  assert make_mesh(MeshConfig(4, 2)).size == 8


def test_replicas_are_whole_slices(monkeypatch):
  pytest.importorskip('libtpu', reason='pip install -r requirements-tpu.txt')
  for name, value in (('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_WORKER_ID', '0'),
                      ('TPU_ACCELERATOR_TYPE', 'v5p-8')):
    monkeypatch.setenv(name, value)
  devices = topologies.get_topology_desc('v5p:2x2x2', 'tpu', num_slices=2).devices
  for sizes in ((-1, 2, 2), (2, 2, 4)):
    mesh = make_mesh(MeshConfig(*sizes), devices)
    half = len(mesh.devices) // 2
    assert [{device.slice_index for device in part.flat} for part in (mesh.devices[:half], mesh.devices[half:])] == [{0}, {1}]
  with pytest.raises(UserError, match=r'^mesh\.replica: 1, accepted: a multiple of the 2 slices'):
    make_mesh(MeshConfig(), devices)


MODEL = {'width': 32, 'heads': 4, 'vocab_size': 64}


@pytest.mark.parametrize('model, rest, message', [
    ({}, {'batch_size': 6}, 'batch_size: 6, accepted: batch_size a multiple of mesh.data=4'),
    ({}, {'batch_size': 24, 'microbatches': 4},
     'batch_size: 24, accepted: batch_size / microbatches a multiple of mesh.data=4'),
    ({'width': 9, 'heads': 3}, {}, 'model.heads: 3, accepted: 3 to be a multiple of mesh.model=2'),
    ({'kv_heads': 1}, {}, 'model.kv_heads: 1, accepted: 1 to be a multiple of mesh.model=2'),
    ({'mlp_width': 33}, {}, 'model.mlp_width: 33, accepted: 33 to be a multiple of mesh.model=2'),
    ({'vocab_size': 65, 'vocab_multiple': 5}, {},
     'model.vocab_multiple: 5, accepted: 65 to be a multiple of mesh.model=2'),
])
def test_sizes_that_the_mesh_does_not_divide_are_refused(model, rest, message):
  config = Config(model=ModelConfig(**MODEL | model), **{'batch_size': 8} | rest)
  with pytest.raises(UserError) as caught:
    check_sizes(config, make_mesh(MeshConfig(4, 2)))
  assert str(caught.value) == message
  check_sizes(config, make_mesh(MeshConfig(1, 1)))


@pytest.mark.parametrize('sizes', [(1, 1), (8, 1), (4, 2), (2, 4)])
def test_sizes_that_divide_pass(sizes):
  config = Config(model=ModelConfig(**MODEL), batch_size=16, microbatches=2)
  check_sizes(config, make_mesh(MeshConfig(*sizes)))
