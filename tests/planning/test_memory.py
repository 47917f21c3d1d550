"""Bytes that a device keeps of a row for the backward pass, by remat policy."""

import dataclasses

import pytest
from tiers import full

from gptjax import config as configs
from gptjax.config import ComputeConfig, MeshConfig
from gptjax.planning import memory
from gptjax.planning.memory import row_bytes


def size(style, model=1, layers=2, **compute):
  """Bytes that each of `model` devices keeps of a row of 24 tokens."""
  return row_bytes(dataclasses.replace(style, layers=layers), ComputeConfig(**compute), 24, model)


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_activations_grow_with_layers_and_shrink_with_remat(style):
  none, stacked = size(style), size(style, scan=True)
  assert none > 0 and 0.9 < stacked / none < 1.1
  assert size(style, dtype='bfloat16') < 0.8 * none
  for scan in (False, True):
    full, dots = size(style, remat='full', scan=scan), size(style, remat='dots', scan=scan)
    assert full < dots < (stacked if scan else none)
    assert full < size(style, remat='names', saved=('q', 'up'), scan=scan) < dots
    assert size(style, remat='names', scan=scan) == full
    # Where complete blocks are recomputed, a layer keeps its input and nothing else.
    one, three = (size(style, remat='full', scan=scan, layers=layers) for layers in (1, 3))
    assert three - one == 2 * 24 * style.width * 4


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
@pytest.mark.parametrize('remat', ['none', full('dots'), full('full')])
def test_a_part_of_a_long_row_is_counted_for_all_of_it(style, remat, monkeypatch):
  compute = ComputeConfig(attention='splash', remat=remat, scan=True)
  found = []
  for traced in (128, 512):
    monkeypatch.setattr(memory, 'TRACED', traced)
    row_bytes.cache_clear()
    found.append(row_bytes(style, compute, 512, 2))
  row_bytes.cache_clear()
  assert found[0] == found[1] > 0


def test_devices_may_have_too_few_tokens_for_a_kernel(tiny):
  of = lambda size: memory.analytic_memory(configs.override(tiny, {'compute.attention': 'auto', 'mesh.model': 1, 'mesh.context': size}),
                                           MeshConfig(data=2, model=1, context=size).sizes)
  assert of(4).activations == pytest.approx(of(2).activations / 2)  # 32 and 64 tokens


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_tensor_parallelism_splits_a_row_and_sequence_parallelism_all_of_it(style):
  large = lambda model, **compute: size(style, model, layers=8, scan=True, **compute)
  assert large(2) < large(1) and large(2, sequence_parallel=True) < large(2)
  per_layer = lambda model: (size(style, model, layers=8, scan=True, remat='full', sequence_parallel=True)
                             - size(style, model, layers=7, scan=True, remat='full', sequence_parallel=True))
  assert 2 * per_layer(2) == per_layer(1) == 24 * style.width * 4


def test_lion_keeps_one_moment_where_adam_keeps_two(tiny):
  of = lambda name: memory.analytic_memory(configs.override(tiny, {'optimizer.name': name}), tiny.mesh.sizes)
  assert of('lion').optimizer == pytest.approx(of('adamw').optimizer / 2, rel=1e-4) and of('lion').parameters == of('adamw').parameters


def test_a_device_has_room_for_the_tokens_of_all_that_share_its_experts(tiny):
  experts = configs.override(tiny, {'model.experts': 8, 'model.experts_per_token': 2, 'model.expert_width': 512, 'mesh.model': 1,
                                    'compute.remat': 'none'})
  kept = lambda config, **sizes: memory.analytic_memory(config, MeshConfig(model=1, **sizes).sizes).activations
  more = kept(configs.override(experts, {'model.experts_per_token': 8}), data=8) - kept(experts, data=8)
  assert kept(experts, data=2, expert=4) - kept(experts, data=8) == pytest.approx(more) and more > 0
