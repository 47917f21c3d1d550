"""Bounds, their arithmetic, the search, and reports."""

import dataclasses
import json
import math

import pytest
from commands import run_module
from tiers import full

from gptjax import config as configs
from gptjax.config import MeshConfig, UserError
from gptjax.model import flops_per_token
from gptjax.planning import as_json, describe, draw, estimate, parse, ranking, roofline, search
from gptjax.planning.collectives import Collective
from gptjax.planning.search import candidates, rank, settings
from gptjax.sharding.chips import GIB


def test_each_resource_takes_its_bytes_over_its_bandwidth(large, at_stage):
  topology, sizes = parse('v5p:4x4x4'), MeshConfig(data=16, model=4).sizes
  config = at_stage(large, 3, remat='none')
  memory = estimate(dataclasses.replace(large, mesh=configs.MeshConfig(16, 4)), topology).memory
  moved = [Collective('all-gather', 'bf16', 16e9, 16, ('data',), 4), Collective('all-reduce', 'f32', 4e9, 4, ('model',), 10),
           Collective('all-reduce', 'f32', 6.4e9, 64, ('data', 'model'))]
  bounds = roofline(config, topology, sizes, moved, memory)
  flops = 256 * 4096 / 64 * flops_per_token(config.model, 4096)
  assert bounds.flops == bounds.executed == pytest.approx(flops)
  assert bounds.seconds['compute'] == pytest.approx(flops / 459e12)
  assert bounds.seconds['ICI (data)'] == pytest.approx(4 * 15e9 / 400e9)
  assert bounds.seconds['ICI (model)'] == pytest.approx(10 * 6e9 / 200e9 + 2 * 6.3e9 / 200e9)
  assert bounds.overlapped == max(bounds.seconds.values()) <= bounds.sequential == sum(bounds.seconds.values())
  assert bounds.seconds[bounds.bottleneck] == bounds.overlapped and bounds.mfu(flops / 459e12) == pytest.approx(1)


def test_remat_is_paid_for_in_compute(large, at_stage):
  executed = lambda remat: estimate(at_stage(large, 3, remat=remat), parse('v5p:4x4x4')).bounds
  none, dots, full = map(executed, ('none', 'dots', 'full'))
  assert none.executed == none.flops == dots.flops == full.flops < dots.executed < full.executed < 4 / 3 * full.flops


@pytest.mark.parametrize('global_every, keys', [full(0, 32 * 3840.0625), (4, 24 * 3840.0625 + 8 * 16384.5)])
def test_recomputed_attention_is_that_of_each_layers_window(global_every, keys):
  # Mistral 7B at 32k tokens: the first 4096 see 2048.5 on average, the others 4096.
  model = configs.ModelConfig(layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336, vocab_size=32000, window=4096,
                              global_every=global_every, positions='rope', norm='rmsnorm', mlp='swiglu', bias=False, tied=False)
  config = configs.Config(model=model, compute=configs.ComputeConfig(scan=True, remat='dots', attention='blocks'), batch_size=64,
                          data=configs.DataConfig(context=32768), zero_stage=3)
  bounds = estimate(config, parse('v5p:4x4x4')).bounds
  assert (bounds.executed - bounds.flops) / 32768 == pytest.approx(4 * 4096 * keys, rel=1e-6)


def test_memory_is_that_of_the_chosen_attention(large, at_stage):
  def temporaries(topology, **compute):
    return estimate(at_stage(large, 3, **compute), parse(topology)).memory.temporaries
  assert temporaries('h100:8x8', attention='xla') > 2 * temporaries('h100:8x8', attention='blocks')  # the full square of scores
  assert temporaries('h100:8x8', attention='auto', dtype='float32') == temporaries('v5p:4x4x4', attention='blocks', dtype='float32')
  with pytest.raises(UserError, match='compute.attention'):
    estimate(at_stage(large, 3, attention='splash'), parse('h100:8x8'))


def test_days_and_tokens(large):
  one = estimate(large, parse('v5p:4x4x4'))
  assert one.tokens == pytest.approx(1e12, rel=1e-6) and one.steps == 953_675
  assert one.days(86_400) == one.steps


@pytest.mark.parametrize('values, field', [
  ({'model.vocab_size': 0}, 'model.vocab_size'), ({'steps': '2 epochs'}, 'steps'), ({'batch_size': 100}, 'batch_size'),
  ({'optimizer.warmup': '1 epoch'}, 'optimizer.warmup'), ({'mesh.model': 16}, 'model.heads')])
def test_a_config_that_cannot_be_planned_is_an_error(large, values, field):
  with pytest.raises(UserError, match=field):
    estimate(configs.override(large, values), parse('v5p:4x4x4'))


@pytest.fixture(scope='module')
def ranked(tiny):
  return search(configs.override(tiny, {'mesh.data': -1, 'batch_size': 32}), parse('h100:4x2'))


def test_the_search_is_sorted_and_every_candidate_valid(ranked, tiny):
  assert [rank(one) for one in ranked] == sorted(rank(one) for one in ranked)
  found = [tuple(settings(one).values()) for one in ranked]
  assert len(set(found)) == len(found) > 20
  for one in ranked:
    sizes = one.sizes
    assert math.prod(sizes.values()) == 8 and one.config.batch_size == 32
    assert one.config.microbatch_size % (sizes['replica'] * sizes['data']) == 0 and tiny.model.heads % sizes['model'] == 0
  assert {one.sizes['replica'] for one in ranked} == {1, 2} and {one.config.zero_stage for one in ranked} >= {0, 3}
  assert {one.config.pipeline.schedule for one in ranked if one.sizes['pipe'] > 1} == {'1F1B', 'ZBH1'}  # 2 layers are too few for chunks
  stages = [one.sizes['pipe'] > 1 for one in ranked if one.fits]
  assert stages == sorted(stages) and any(stages)


def test_the_search_puts_what_fits_first_and_tries_every_layout(ranked, tiny):
  config = ranked[0].config
  small = dataclasses.replace(ranked[0].topology.chip, memory=sorted(one.needed for one in ranked)[len(ranked) // 2] / 0.9)
  fits = [one.fits for one in search(config, dataclasses.replace(ranked[0].topology, chip=small))]
  assert fits == sorted(fits, reverse=True) and True in fits and False in fits
  meshes = {(one['mesh.replica'], one['mesh.model']) for one in candidates(config, ranked[0].topology)}
  assert meshes == {(r, m) for r in (1, 2) for m in (1, 2, 4, 8) if r * m <= 8}


def test_the_search_divides_tokens_and_experts_too(tiny):
  config = configs.override(tiny, {'data.context': 4096, 'model.experts': 4, 'mesh.data': -1, 'batch_size': 32})
  found = list(candidates(config, parse('h100:8')))
  assert {one['mesh.context'] for one in found} == {1, 2, 4} and {one['mesh.expert'] for one in found} == {1, 2, 4}
  assert all(math.prod(size for name, size in one.items() if name.startswith('mesh.')) == 8 for one in found)


def test_a_batch_that_nothing_divides_is_an_error(tiny):
  with pytest.raises(UserError, match='batch_size'):
    search(configs.override(tiny, {'mesh.data': -1, 'batch_size': 3}), parse('h100:8'))


def test_a_plan_in_words_and_as_json_and_as_a_picture(ranked, tmp_path):
  one = ranked[0]
  text = describe(one)
  for word in ('fits, analytic', 'tokens per day', 'chip-hours', one.bounds.bottleneck, 'gradients', 'of the memory'):
    assert word in text
  assert ranking(ranked).count('\n') == 12 and f'{len(ranked)} layouts' in ranking(ranked)
  data = json.loads(json.dumps(as_json(one)))
  days = data['bounds']['usual']['days']
  assert f'expect about {days:.1f} days, at {min(one.bounds.mfu(one.bounds.overlapped), 0.4):.0%} MFU' in text
  assert days == pytest.approx(max(one.days(one.bounds.overlapped), one.days(one.bounds.flops / one.topology.chip.flops / 0.4)))
  assert data['memory']['total'] == one.needed and data['fits'] and data['bounds']['overlapped']['seconds'] == one.bounds.overlapped
  draw(ranked[:4], tmp_path / 'memory.png')
  assert (tmp_path / 'memory.png').read_bytes().startswith(b'\x89PNG')
  refused = dataclasses.replace(one, refusal='needs 20G of 16G')
  assert not refused.fits and 'does not fit: needs 20G of 16G' in describe(refused)


def test_the_command_plans_gpus(tmp_path):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text("from gptjax.config import Config, ModelConfig\n"
                    "def get_config():\n  return Config(model=ModelConfig(vocab_size=512), steps='1e6 tokens')\n")
  done = run_module('gptjax.plan', f'--config={recipe}', '--topology=h100:8', f'--json={tmp_path}/plan.json')
  assert done.returncode == 0 and 'chip-hours' in done.stdout and '72.0 GiB' in done.stdout, done.stderr
  assert json.loads((tmp_path / 'plan.json').read_text())['plan']['available'] == pytest.approx(0.9 * 80 * GIB)
  for flag, expected in ((f'--json={tmp_path}/no/plan.json', 'a file in an existing folder'), (f'--json={tmp_path}', 'a file that can be'),
                         (f'--picture={tmp_path}/plan.jpeg2', 'a file that ends in .png')):
    done = run_module('gptjax.plan', f'--config={recipe}', '--topology=h100:8', flag)  # nothing was computed yet
    assert (done.returncode, done.stdout) == (2, '') and f'expected: {expected}' in done.stderr and done.stderr.count('\n') == 1
