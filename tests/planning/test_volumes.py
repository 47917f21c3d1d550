"""Theory against the formulas of the papers, in closed form."""

import dataclasses

import pytest

from gptjax.config import LoraConfig, MeshConfig
from gptjax.model import parameter_count
from gptjax.planning import analytic_memory, theoretical
from gptjax.planning.collectives import totals
from gptjax.planning.volumes import by_axis

SIZES = MeshConfig(data=16, model=4).sizes


@pytest.mark.parametrize('sizes', [SIZES, MeshConfig(data=64, model=1).sizes, MeshConfig(replica=2, data=8, model=4).sizes])
@pytest.mark.parametrize('stage', [0, 3])
def test_state_is_that_of_the_zero_paper(large, at_stage, stage, sizes):
  memory = analytic_memory(at_stage(large, stage), sizes)
  each = parameter_count(large.model, 4096) / sizes['model'] / (sizes['data'] if stage else 1)
  assert memory.parameters == pytest.approx(4 * each, rel=0.01) and memory.optimizer == pytest.approx(8 * each, rel=0.01)
  assert memory.state + memory.gradients == pytest.approx(16 * each, rel=0.01)


def test_gradients_and_copies_follow_the_stage(large, at_stage):
  count = parameter_count(large.model, 4096) / 4
  gradients = [analytic_memory(at_stage(large, stage), SIZES).gradients for stage in range(4)]
  assert gradients == pytest.approx([4 * count, 4 * count, 4 * count / 16, 4 * count / 16], rel=0.01)
  assert analytic_memory(at_stage(large, 0), SIZES).gathered == 0
  layer = count / 40
  assert 2 * 2 * layer < analytic_memory(large, SIZES).gathered < 2 * 4 * layer


@pytest.mark.parametrize('stage, passes', [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_bytes_of_data_parallelism_are_multiples_of_the_parameters(large, at_stage, stage, passes):
  config = at_stage(large, stage, dtype='float32')
  sent = by_axis(theoretical(config, SIZES))['data']
  once = 4 * parameter_count(large.model, 4096) / 4 * 15 / 16
  assert sent == pytest.approx(passes * once, rel=0.02)


@pytest.mark.parametrize('stage, times', [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_gradients_are_reduced_once_per_step_or_with_every_microbatch(large, at_stage, stage, times):
  def sent(parts):
    found = theoretical(at_stage(dataclasses.replace(large, microbatches=parts), stage), SIZES)
    return sum(one.total for one in found if one.why.startswith('gradients') and one.axes == ('data',))
  assert sent(4) == times * sent(1) > 0


def test_frozen_parameters_have_neither_gradients_nor_optimizer_state(large):
  half = dataclasses.replace(large, frozen=tuple(f'blocks/*/{name}/kernel' for name in ('mlp/up', 'mlp/gate', 'mlp/down')))
  share = 1 - 40 * 3 * 5120 * 13824 / parameter_count(large.model, 4096)
  every, some = (analytic_memory(config, SIZES) for config in (large, half))
  assert some.parameters == every.parameters and some.optimizer == pytest.approx(share * every.optimizer, rel=0.01)
  assert some.gradients == pytest.approx(share * every.gradients, rel=0.01)
  every, some = (totals(theoretical(config, SIZES)) for config in (large, half))
  data = (('data',), 'reduce-scatter', 'f32')
  assert some[data] == pytest.approx(share * every[data], rel=0.01)
  assert {kind for kind in every if every[kind] != some[kind]} == {data}


def test_adapters_alone_have_gradients_and_optimizer_state(large):
  adapted = dataclasses.replace(large, lora=LoraConfig(rank=16, targets=('blocks/*/mlp/up/kernel',)), init_from='runs/base')
  every, some = (analytic_memory(config, SIZES) for config in (large, adapted))
  each = 40 * 16 * (5120 + 13824 / 4) / 16  # model does not split A
  assert some.optimizer == pytest.approx(8 * each, rel=0.01) and some.gradients == pytest.approx(4 * each, rel=0.01)
  assert some.parameters == pytest.approx(every.parameters + 4 * each, rel=1e-3)


@pytest.mark.parametrize('remat, norm_at, sums', [
  ('none', 'pre', 4), ('dots', 'pre', 4), ('full', 'pre', 5), ('none', 'post', 4), ('dots', 'post', 5), ('full', 'sandwich', 6)])
def test_tensor_parallelism_is_megatrons(large, at_stage, remat, norm_at, sums):
  model = dataclasses.replace(large.model, norm_at=norm_at)
  found = totals(theoretical(at_stage(dataclasses.replace(large, model=model), 3, remat=remat), SIZES))
  stream = 256 / 16 * 4096 * 5120 * 2
  assert found[('model',), 'all-reduce', 'bf16'] == pytest.approx((40 * sums + 2) * 2 * stream * 3 / 4)


def test_key_heads_that_are_not_split_have_gradients_to_sum(large):
  shared = lambda kv_heads: dataclasses.replace(large, model=dataclasses.replace(large.model, kv_heads=kv_heads))
  def sent(kv_heads):
    found = totals(theoretical(shared(kv_heads), SIZES))
    return found[('model',), 'all-reduce', 'bf16'], found.get((('model',), 'all-gather', 'bf16'), 0.0)
  one = 40 * 256 / 16 * 4096 * 2 * 128 * 2  # layers, rows of a device, tokens, a key and a value of 128 features, bfloat16
  (base, none), (two, gathered), (single, alone) = sent(8), sent(2), sent(1)
  assert sent(40) == (base, none) and none == alone == 0
  assert single - base == pytest.approx(2 * one * 3 / 4)  # the four devices add up the gradient of one head
  assert (two - base, gathered) == pytest.approx((2 * one / 2, 2 * one / 2))  # pairs of devices, which then exchange two heads


def test_replicas_reduce_the_part_that_a_device_holds(large):
  found = by_axis(theoretical(large, MeshConfig(replica=2, data=8, model=4).sizes))
  assert found['replica'] == pytest.approx(4 * parameter_count(large.model, 4096) / 4 / 8, rel=0.01)


@pytest.mark.parametrize('remat, repeated', [('none', 0), ('full', 6)])
def test_keys_and_values_visit_every_device_and_their_gradients_come_back(large, at_stage, remat, repeated):
  sizes = MeshConfig(data=2, context=8, model=4).sizes
  own = 40 * 256 / 2 * 4096 / 8 * 2 * 5120 / 4  # layers, rows, tokens, keys and values of this device's heads
  ring, gathered = (totals(theoretical(at_stage(large, 3, remat=remat, context_attention=name), sizes)) for name in ('ring', 'all_gather'))
  context = ('context',)
  assert ring[context, 'collective-permute', 'bf16'] == 2 * own * (7 + 7 + repeated + 1)
  assert gathered[context, 'all-gather', 'bf16'] == 2 * own * (7 + 7)
  assert ring[context, 'collective-permute', 'f32'] == gathered[context, 'reduce-scatter', 'f32'] == 4 * own * 7


def test_the_tokens_of_a_row_are_shared_out(large, at_stage):
  dots = at_stage(large, 3, remat='dots')
  kept = lambda **sizes: analytic_memory(dots, MeshConfig(**sizes).sizes).activations
  assert kept(data=2, context=8, model=4) == pytest.approx(kept(data=2, model=4) / 8, rel=0.01)


def test_one_device_sends_nothing(large):
  assert theoretical(large, MeshConfig(data=1, model=1).sizes) == []


def test_activations_are_shared_out(large, at_stage):
  config = at_stage(large, 3)
  kept = lambda **sizes: analytic_memory(config, MeshConfig(**sizes).sizes).activations
  assert kept(data=32, model=1) == pytest.approx(kept(data=16, model=1) / 2)
  residual = 256 / 16 * 4096 * 5120 * 2 * 40  # full remat keeps each layer's input, complete on each device of `model`
  assert kept(data=16, model=4) == pytest.approx(residual, rel=0.15)
  named = lambda **names: analytic_memory(at_stage(large, 3, remat='names', **names), MeshConfig(data=16, model=1).sizes).activations
  assert named(offloaded=('q', 'up')) == named() == kept(data=16, model=1) < named(saved=('q', 'up'))
  dots = at_stage(large, 3, remat='dots')
  more, split = (analytic_memory(dots, SIZES | {'model': n}).activations for n in (1, 4))
  assert kept(data=16, model=1) < more and split < 0.5 * more
