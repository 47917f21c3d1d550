"""Peak FLOP/s of devices."""

from unittest import mock

import jax
import pytest

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
  assert peak_flops(devices(kind, 4)) == (4 * each, f'{name} bfloat16 data sheet')


def test_a_device_without_a_data_sheet_has_no_known_peak():
  assert peak_flops(jax.devices()) is None  # CPUs
  assert peak_flops(devices('NVIDIA GeForce RTX 4090', 1)) is None
