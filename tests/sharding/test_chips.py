"""Peak FLOP/s of devices."""

from unittest import mock

import jax
import pytest

from gptjax.sharding import chips
from gptjax.sharding.chips import peak_flops


def devices(kind, count):
  return [mock.Mock(spec=jax.Device, device_kind=kind) for _ in range(count)]


@pytest.mark.parametrize('kind, name, each', [
  ('TPU v4', 'TPU v4', 275e12), ('TPU v5 lite', 'TPU v5 lite', 197e12), ('TPU v5', 'TPU v5', 459e12),
  ('TPU v5p', 'TPU v5p', 459e12),
  ('TPU v6 lite', 'TPU v6 lite', 918e12), ('NVIDIA A100-SXM4-80GB', 'NVIDIA A100', 312e12),
  ('NVIDIA H100 80GB HBM3', 'NVIDIA H100', 989e12), ('NVIDIA H200', 'NVIDIA H200', 989e12),
])
def test_known_devices_have_the_flops_of_their_data_sheet(kind, name, each):
  assert peak_flops(devices(kind, 4), 'float32') == (4 * each, f'{name} bfloat16 data sheet')


@pytest.mark.parametrize('mesh', ['4x2'], indirect=True)  # a run's mesh must not be in the way
def test_other_devices_are_measured(mesh, monkeypatch):
  peak, source = peak_flops(jax.devices()[:1], 'bfloat16')
  assert 1e8 < peak < 1e15 and source == 'measured 2048 x 2048 bfloat16 matrix product'
  # A product takes half a second; virtual CPU devices count as one machine.
  monkeypatch.setattr(chips.timeit, 'repeat', lambda run, number, repeat: [0.5] * repeat)
  assert peak_flops(jax.devices(), 'float32') == (2 * 2048**3 / 0.5, 'measured 2048 x 2048 float32 matrix product')
