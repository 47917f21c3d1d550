"""The devices' peak FLOP/s, and the count of compilations."""

from unittest import mock

import jax
import numpy as np
import pytest

from gptjax.training import hardware
from gptjax.training.hardware import CompileCounter, peak_flops


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
  # With a clock that moves half a second a look, virtual CPU devices are still one machine.
  clock = mock.Mock()
  clock.perf_counter.side_effect = np.arange(0, 100, 0.5).tolist()
  monkeypatch.setattr(hardware, 'time', clock)
  assert peak_flops(jax.devices(), 'float32') == (2 * 2048**3 / 0.5, 'measured 2048 x 2048 float32 matrix product')


def test_every_compiled_program_is_counted_once():
  counter, other = CompileCounter(), CompileCounter()
  double, triple = jax.jit(lambda x: 2 * x), jax.jit(lambda x: 3 * x)
  x = np.ones(3, np.float32)
  double(x), double(x), double(x + 1)
  assert counter.count == 1
  triple(x)
  double(np.ones(4, np.float32))  # another shape is another program
  assert counter.count == other.count == 3
  counter.close()
  triple(np.ones(5, np.float32))
  assert (counter.count, other.count) == (3, 4)
  other.close()
