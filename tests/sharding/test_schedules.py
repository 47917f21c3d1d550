"""Schedules have the length and the memory of their formulas, and no operation runs before what it needs."""

import dataclasses

import pytest
from tiers import full

from gptjax.sharding import SCHEDULES, Operation, assign_places, make_schedule

STAGES = [2, 3, 4, *map(full, range(5, 9))]


@pytest.mark.parametrize('stages', STAGES)
@pytest.mark.parametrize('name, ticks', [
  ('GPipe', lambda s, m: 3 * m + 2 * (s - 1)), ('1F1B', lambda s, m: 3 * m + 2 * (s - 1)), ('ZBH1', lambda s, m: 3 * m + s - 1)])
def test_length_and_memory_are_those_of_the_papers(name, ticks, stages):
  for microbatches in range(stages, 4 * stages + 1):
    schedule = make_schedule(name, stages, microbatches)
    schedule.check()
    assert schedule.ticks == ticks(stages, microbatches)
    assert schedule.bubble == pytest.approx(1 - 3 * microbatches / schedule.ticks)
    assert max(schedule.kept()) == (microbatches if name == 'GPipe' else stages)
    if name == '1F1B':
      assert schedule.kept() == [stages - stage for stage in range(stages)]


@pytest.mark.parametrize('stages', STAGES)
@pytest.mark.parametrize('chunks', [2, 3, 4])
def test_chunks_divide_the_bubble(chunks, stages):
  for microbatches in range(stages, 4 * stages + 1):
    schedule = make_schedule('Interleaved1F1B', stages, microbatches, chunks)
    schedule.check()
    # A tick of a chunk is shorter by the number of chunks than one of a stage.
    idle = schedule.ticks - 3 * microbatches * chunks
    assert idle / chunks == (make_schedule('1F1B', stages, microbatches).ticks - 3 * microbatches) / chunks


@pytest.mark.parametrize('stages', STAGES)
def test_fewer_microbatches_than_stages_are_possible(stages):
  for name in SCHEDULES:
    for microbatches in range(1, stages):
      make_schedule(name, stages, microbatches, 2 if name == 'Interleaved1F1B' else 1).check()


def without(table, tick, stage):
  return tuple(tuple(None if (t, s) == (tick, stage) else one for s, one in enumerate(row)) for t, row in enumerate(table))


def swapped(table, one, other, stage):
  """The operations of a stage at two ticks in each other's place."""
  change = {one: table[other][stage], other: table[one][stage]}
  return tuple(tuple(change.get(t, x) if s == stage else x for s, x in enumerate(row)) for t, row in enumerate(table))


@pytest.mark.parametrize('broken, message', [
  (lambda table: without(table, 4, 1), 'missing'),
  (lambda table: (*table, table[0]), 'repeated'),
  (lambda table: (table[0], (table[1][0], None, table[1][1]), *table[2:]), 'repeated|missing|unknown'),  # run by another stage
  (lambda table: swapped(table, 0, 3, 0), 'not after'),  # F of stage 1 before F of stage 0
  (lambda table: table[::-1], 'not after'),
  (lambda table: tuple(tuple(one and one._replace(chunk=1) for one in row) for row in table), 'unknown'),
  (lambda table: (tuple(row[0] for row in table[:1]) + (Operation('F', 0), Operation('F', 0)), *table[1:]), 'repeated'),  # all at once
])
def test_the_check_finds_broken_tables(broken, message):
  schedule = make_schedule('1F1B', 3, 4)
  schedule.check()
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(schedule, table=broken(schedule.table)).check()


@pytest.mark.parametrize('name', SCHEDULES)
def test_what_is_kept_is_read_from_where_it_was_written(name):
  """A simulation that writes names of values into the places, and reads them where an operation needs them."""
  kept, factors, chunks = (0, 1, 0), (1, 2), 2 if name == 'Interleaved1F1B' else 1
  for stages, microbatches in ((2, 1), (4, 8), (4, 10)):
    schedule = make_schedule(name, stages, microbatches, chunks)
    places, last = assign_places(schedule, kept, factors), stages * chunks - 1
    memory = [{} for _ in range(stages)]
    for tick, row in enumerate(schedule.table):
      sent = {}
      for stage, one in enumerate(row):
        at = lambda field: getattr(places.ticks, field)[tick, stage]
        if one is None:
          assert at('operation') == 0
          continue
        mine, virtual = memory[stage], one.chunk * stages + stage
        assert (' FBW'[at('operation')], at('microbatch'), at('chunk')) == one
        if one.kind == 'F':
          assert virtual == 0 or mine['activation', at('read')] == (one.microbatch, virtual)
          mine |= {(kind, at('kept')[i]): ('F', *one[1:], i) for i, kind in enumerate(kept)}
          sent[stage] = ('F', one.microbatch, virtual)
        elif one.kind == 'B':
          assert mine['gradient', at('read')] == (one.microbatch, virtual)
          assert all(mine[kind, at('kept')[i]] == ('F', *one[1:], i) for i, kind in enumerate(kept))
          mine |= {(kind, at('factors')[i]): ('B', *one[1:], i) for i, kind in enumerate(factors)}
          sent[stage] = ('B', one.microbatch, virtual)
        else:
          assert all(mine[kind, at('factors')[i]] == ('B', *one[1:], i) for i, kind in enumerate(factors))
        assert all(at('kept')[i] < places.kept[kind] for i, kind in enumerate(kept))
      for stage in range(stages):
        at = lambda field: getattr(places.ticks, field)[tick, stage]
        kind, microbatch, virtual = sent.get((stage - 1) % stages, ('', 0, 0))
        memory[stage]['activation', at('store_activation')] = (microbatch, virtual + 1) if kind == 'F' else None
        kind, microbatch, virtual = sent.get(stage, ('', 0, 0))
        memory[stage]['gradient', at('store_output')] = (microbatch, virtual) if kind == 'F' and virtual == last else None
        kind, microbatch, virtual = sent.get((stage + 1) % stages, ('', 0, 0))
        memory[stage]['gradient', at('store_gradient')] = (microbatch, virtual - 1) if kind == 'B' else None
