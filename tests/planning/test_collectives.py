"""Bytes between devices, read from hand-written programs and from an actual one."""

import importlib.util

import pytest

from gptjax.config import MeshConfig, override
from gptjax.planning import collectives, estimate, parse, theoretical
from gptjax.planning.collectives import PADDED, Collective, totals
from gptjax.planning.program import compile_on
from gptjax.sharding import make_mesh

# The tests keep compiled programs on disk, and those of absent TPUs cannot be loaded back.
pytestmark = pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache')

MESH = MeshConfig(data=4, model=2).sizes

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.7 (input: bf16[64,32]) -> bf16[16,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=5, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add.1
  ROOT %slice = bf16[16,32]{1,0} dynamic-slice(%all-reduce.9, %start), dynamic_slice_sizes={16,32}
}

%chain.1 (p: f32[8,16]) -> f32[32,16] {
  ROOT %all-gather.1 = f32[32,16]{1,0} all-gather(%p), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%async_collective_fusion.2 (p: f32[8,16]) -> f32[32,16] {
  ROOT %all-gather.2 = f32[32,16]{1,0} all-gather(%p), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %scattered = bf16[16,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7
  %first = f32[32,16]{1,0} fusion(%x), kind=kCustom, calls=%chain.1
  %second = f32[32,16]{1,0} fusion(%first), kind=kOutput, calls=%async_collective_fusion.2
  %inner = (s32[], f32[8]) while(%carry), condition=%inner_bound, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"}}
}

%inner_body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %permute = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), \
source_target_pairs={{0,2},{2,4},{4,6},{1,3}}
  %moved = bf16[4,8]{1,0} collective-permute-done(%permute)
}

%inner_bound (carry: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

%called_computation (p: f32[2,4], t: token[]) -> f32[8,4] {
  ROOT %all-gather.3 = f32[8,4]{1,0} all-gather(%p), channel_id=8, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%bound (carry: (s32[], f32[8])) -> pred[] {
  %last = s32[]{:T(128)} constant(40)
  ROOT %less = pred[] compare(%counter, %last), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %zeros = bf16[8,4]{1,0} broadcast(%zero), dimensions={}
  %shard = bf16[8,4]{1,0} dynamic-update-slice(%broadcast.3, %x, %zero, %at)
  %all-reduce.2 = bf16[8,4]{1,0} all-reduce(%shard), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add.1
  %both = (f32[10]{0:T(1024)}, bf16[6]{0}, /*index=2*/f32[]) all-reduce(%x, %y, %z), \
replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, to_apply=%add.1
  %start = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %done = f32[4,8]{1,0} all-gather-done(%start)
  %beside = ((f32[2,4]{1,0}, token[]), f32[8,4]{1,0}) call-start(%x, %t), async_execution_thread="sparsecore", to_apply=%called_computation
  %after = f32[8,4]{1,0} call-done(%beside)
  %whole = f32[3]{0} all-reduce(%x), replica_groups={}, to_apply=%add.1
  %alone = f32[3]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add.1
  ROOT %loop = (s32[], f32[8]) while(%carry), condition=%bound, body=%body
}
"""


def test_every_form_of_a_collective_is_counted_once():
  expected = {
    Collective('all-reduce', 'bf16', 8 * 4 * 2, 4, ('data',), 1, PADDED),
    Collective('all-reduce', 'f32', (10 + 1) * 4, 2, ('model',)),
    Collective('all-reduce', 'bf16', 6 * 2, 2, ('model',)),
    Collective('all-gather', 'f32', 4 * 8 * 4, 2, ('model',)),
    Collective('all-gather', 'f32', 8 * 4 * 4, 4, ('data',)),
    Collective('all-reduce', 'f32', 3 * 4, 8, ('data', 'model')),
    Collective('reduce-scatter', 'bf16', 64 * 32 * 2, 4, ('data',), 40),
    Collective('all-gather', 'f32', 32 * 16 * 4, 4, ('data',), 40),
    Collective('collective-permute', 'bf16', 4 * 8 * 2, 2, ('data',), 40 * 3),
  }
  found = collectives(PROGRAM, MESH)
  assert set(found) == expected and len(found) == len(expected)


def test_bytes_of_a_ring_depend_on_the_kind():
  sent = lambda kind: Collective(kind, 'f32', 800, 4, ('data',), 3).total
  assert sent('all-gather') == sent('reduce-scatter') == 3 * 800 * 3 / 4
  assert sent('all-reduce') == 2 * sent('all-gather') and sent('collective-permute') == 3 * 800


def test_parts_of_axes_and_of_no_axis():
  line = "ENTRY %main (x: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0}} all-reduce(%x), replica_groups={}, to_apply=%add\n}}\n"
  found = lambda groups: [(one.axes, one.group) for one in collectives(line.format(groups), MESH)]
  assert found("mesh['a'=8] {'a':(2)2}") == [(('data',), 2)]
  assert found("mesh['a'=8] {'a':(4)2}") == [(('model',), 2)]
  assert found("mesh['a'=2,'b'=2,'c'=2] {'a','c'}") == [(('data', 'model'), 4)]


def test_a_loop_of_unknown_length_is_an_error():
  text = PROGRAM.replace('constant(40)', 'parameter(0)')
  with pytest.raises(ValueError, match='trip count'):
    collectives(text, MESH)
  with pytest.raises(ValueError, match='ENTRY'):
    collectives('no program', MESH)


def test_a_program_for_cpus_sends_the_bytes_of_theory(tiny):
  config = override(tiny, {'compute.dtype': 'float32', 'microbatches': 2})
  sizes = MeshConfig(data=2, model=2).sizes
  text = compile_on(make_mesh(config.mesh), config).as_text()
  found, theory = totals(collectives(text, sizes)), totals(theoretical(config, sizes))
  for kind in ('all-gather', 'reduce-scatter'):
    assert found[('data',), kind, 'f32'] == pytest.approx(theory[('data',), kind, 'f32'], rel=0.1)  # an embedding is gathered once
  assert not [key for key in found if 'model' in key[0] and key[1] != 'all-reduce']  # split matrices stay split


@pytest.fixture(scope='module')
def compiled(tiny):
  if not importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is not installed: pip install -r requirements-tpu.txt')
  return estimate(tiny, parse('v5e:2x2')).compile()


def test_a_program_for_tpus_sends_the_bytes_of_theory(compiled, tiny):
  found = [one for one in compiled.found if one.payload > 16_000]  # without norms, loss and sums
  theory = [one for one in theoretical(tiny, compiled.sizes) if one.payload > 16_000]
  assert {one.axes for one in found} == {('data',), ('model',)}
  ours, theirs = totals(found), totals(theory)
  for key in ((('model',), 'all-reduce', 'bf16'), (('data',), 'all-gather', 'bf16')):
    assert ours[key] == pytest.approx(theirs[key], rel=0.01)
  assert {one.trips for one in found} == {1, tiny.model.layers}


def test_a_program_for_tpus_holds_the_state_of_theory(compiled):
  batch = 5 * 4 * 8 * 128 / 2  # five arrays of 32 bits, whose rows `data` shares
  assert compiled.compiled.arguments == pytest.approx(compiled.memory.state + batch, rel=0.02)
  assert compiled.fits and compiled.needed == compiled.compiled.total
