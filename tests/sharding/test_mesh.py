"""The mesh takes the available devices, or an error names the sizes that they allow."""

import dataclasses

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from gptjax.config import AXIS_NAMES, ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, UserError
from gptjax.sharding import check_sizes, make_mesh, mesh


@pytest.mark.parametrize('data, model, sizes', [
    (-1, 1, (8, 1)), (-1, 2, (4, 2)), (-1, 8, (1, 8)), (8, 1, (8, 1)), (4, 2, (4, 2)), (2, 4, (2, 4)),
    (1, 1, (1, 1)), (3, 2, (3, 2)), (2, 3, (2, 3)), (5, 1, (5, 1)),  # fewer than there are
])
def test_a_mesh_has_the_sizes_asked_for_as_explicit_axes(data, model, sizes):
  mesh = make_mesh(MeshConfig(data, model))
  assert dict(mesh.shape) == MeshConfig(*sizes).sizes
  assert mesh.axis_types == (AxisType.Explicit,) * len(AXIS_NAMES)
  assert set(mesh.devices.flat) == set(jax.devices()[:sizes[0] * sizes[1]])


@pytest.mark.parametrize('data, model, message', [
    (-1, 3, 'mesh.model: 3, expected: a divisor of the 8 devices: 1, 2, 4, 8'),
    (-1, 16, 'mesh.model: 16, expected: a divisor of the 8 devices: 1, 2, 4, 8'),
    (1, 9, 'mesh.model: 9, expected: a divisor of the 8 devices: 1, 2, 4, 8'),
    (9, 1, 'mesh.data: 9, expected: -1 or at most 8 with 8 devices'),
    (3, 4, 'mesh.data: 3, expected: -1 or at most 2 with 8 devices and mesh.model=4'),
])
def test_devices_that_do_not_suffice_or_divide_are_refused(data, model, message):
  with pytest.raises(UserError) as caught:
    make_mesh(MeshConfig(data, model))
  assert str(caught.value) == message


def test_several_processes_leave_no_device_out(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match=r'^mesh\.data: 2, expected: all 8 devices .*: mesh\.data=4$'):
    make_mesh(MeshConfig(2, 2))
  assert make_mesh(MeshConfig(4, 2)).size == 8


def test_replicas_are_complete_slices(monkeypatch):
  pytest.importorskip('libtpu', reason='pip install -r requirements-tpu.txt')
  for name, value in (('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_WORKER_ID', '0'),
                      ('TPU_ACCELERATOR_TYPE', 'v5p-8')):
    monkeypatch.setenv(name, value)
  devices = topologies.get_topology_desc('v5p:2x2x2', 'tpu', num_slices=2).devices
  for sizes in ((-1, 2, 2), (2, 2, 4)):
    mesh = make_mesh(MeshConfig(*sizes), devices)
    half = len(mesh.devices) // 2
    assert [{device.slice_index for device in part.flat} for part in (mesh.devices[:half], mesh.devices[half:])] == [{0}, {1}]


MODEL = {'width': 32, 'heads': 4, 'vocab_size': 64}


@pytest.mark.parametrize('model, rest, message', [
    ({}, {'batch_size': 6}, 'batch_size: 6, expected: a multiple of mesh.data=4: 4 or 8'),
    ({}, {'batch_size': 3}, 'batch_size: 3, expected: a multiple of mesh.data=4: 4'),
    ({}, {'batch_size': 24, 'microbatches': 4},
     'batch_size: 24, expected: a multiple of mesh.data=4 * microbatches=4: 16 or 32'),
    ({'width': 9, 'heads': 3}, {}, 'mesh.model: 2, expected: a divisor of model.heads=3 and of the 8 devices: 1'),
    ({}, {'compute': ComputeConfig(sequence_parallel=True), 'batch_size': 4, 'data': DataConfig(context=7)},
     'compute.sequence_parallel: True, expected: false, or a multiple of mesh.model=2 tokens on a device, not 7'),
    ({}, {'gradient_noise': True, 'zero_stage': 2}, 'microbatches: 1, expected: 2 or more with gradient_noise, which compares gradients of '
     'parts of a batch; zero_stage=2 sums those of mesh.data at once'),
    ({'experts': 4}, {'gradient_noise': True},
     'model.experts: 4, expected: 0 with gradient_noise: the gradient of their balance is no mean over targets'),
])
def test_sizes_that_the_mesh_does_not_divide_are_refused(model, rest, message):
  config = Config(model=ModelConfig(**MODEL | model), **{'batch_size': 8} | rest)
  with pytest.raises(UserError) as caught:
    check_sizes(config, make_mesh(MeshConfig(4, 2)))
  assert str(caught.value) == message
  check_sizes(dataclasses.replace(config, gradient_noise=False), make_mesh(MeshConfig(1, 1)))


def test_rows_are_shared_by_replicas_too():
  config = Config(model=ModelConfig(**MODEL), batch_size=6)
  with pytest.raises(UserError, match=r'^batch_size: 6, expected: a multiple of mesh\.replica \* mesh\.data=4: 4 or 8$'):
    check_sizes(config, make_mesh(MeshConfig(2, 2, replica=2)))


@pytest.mark.parametrize('sizes', [(1, 1), (8, 1), (4, 2), (2, 4)])
def test_sizes_that_divide_pass(sizes):
  config = Config(model=ModelConfig(**MODEL), batch_size=16, microbatches=2)
  check_sizes(config, make_mesh(MeshConfig(*sizes)))


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """What the arrangement looks at."""

  id: int
  slice_index: int
  process_index: int = 0
  device_kind: str = 'fake'
  platform: str = 'fake'


@pytest.mark.parametrize('slices, sizes', [
  (2, (2, 4, 1)), (2, (2, 2, 2)),  # a group per slice
  (2, (4, 2, 1)), (2, (8, 1, 1)),  # several groups per slice
  (4, (2, 2, 2)), (4, (2, 4, 1)), (4, (1, 4, 2)), (2, (1, 8, 1)),  # several slices per group
])
def test_replica_is_laid_over_slices_first_and_model_stays_within_one(slices, sizes):
  devices = [FakeDevice(index, index % slices) for index in range(8)]  # not in the order of their slices
  replica, data, model = sizes
  arranged = mesh._arranged(MeshConfig(data, model, replica).sizes, devices)
  assert {device.id for device in arranged.flat} == {*range(8)}
  arranged = arranged.reshape(sizes)
  of = lambda group: {device.slice_index for device in group.flat}
  assert all(len(of(arranged[r, d])) == 1 for r in range(replica) for d in range(data))
  assert all(len(of(group)) == max(slices // replica, 1) for group in arranged)
  if replica > 1:
    assert len(of(arranged[0]) & of(arranged[-1])) == 0


@pytest.mark.parametrize('slices, sizes, message', [
  (4, (3, 2, 1), 'mesh.replica: 3, expected: a divisor or a multiple of the 4 slices of the 8 devices: 1, 2, 4, 8, ...'),
  (4, (2, 1, 4), 'mesh.model: 4, expected: a divisor of the 2 devices of a slice: 1, 2'),
])
def test_replicas_that_slices_do_not_allow_are_refused(slices, sizes, message):
  with pytest.raises(UserError) as caught:
    mesh._arranged(MeshConfig(sizes[1], sizes[2], sizes[0]).sizes, [FakeDevice(index, index // (8 // slices)) for index in range(8)])
  assert str(caught.value) == message


def test_replicas_are_of_complete_processes():
  devices = [FakeDevice(index, 0, process_index=index // 2) for index in range(12)]
  with pytest.raises(UserError, match=r'^mesh\.replica: 4, expected: .* of the 6 processes of the 12 devices: 1, 2, 3, 6, 12, '):
    mesh._arranged(MeshConfig(3, 1, replica=4).sizes, devices)
  arranged = mesh._arranged(MeshConfig(2, 2, replica=3).sizes, devices)
  assert [{device.process_index for device in group.flat} for group in arranged] == [{0, 1}, {2, 3}, {4, 5}]
