"""The copy of a state on CPUs that a save writes is independent of the state."""

import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.checkpoint import Checkpoints, Progress, Retention
from gptjax.checkpoint.staging import HostStaging


def state(mesh, seed):
  draw = np.random.default_rng(seed).standard_normal
  put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))
  return {'split': put(draw((8, 64), np.float32), 'data', 'model'), 'replicated': put(draw(33).astype(ml_dtypes.bfloat16)),
          'scalar': put(np.int32(seed)), 'host': draw(3)}


@pytest.mark.parametrize('mesh', ['1x1', '4x2'], indirect=True)
def test_a_copy_is_independent_of_its_state_and_reuses_its_memory(mesh):
  staging, places = HostStaging(), []
  step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 2, x), donate_argnums=0)
  for seed in (0, 1):
    one = state(mesh, seed)
    one = step({name: value for name, value in one.items() if name != 'host'}) | {'host': one['host']}  # made by a step, as in a run
    expected = jax.tree.map(np.array, one)
    if not seed:
      staging.reserve(one)()
      places.append([memory.ctypes.data for memory in staging._memory.values()])
    host = one.pop('host')
    copied = staging.copy(one | {'host': host})
    addresses = [shard.data.unsafe_buffer_pointer() for shard in one['split'].addressable_shards]
    new = step(one)
    assert [shard.data.unsafe_buffer_pointer() for shard in new['split'].addressable_shards] == addresses  # donated, not taken
    for name, value in copied.items():
      assert value.dtype == expected[name].dtype and (np.asarray(value) == expected[name]).all()
    assert copied['split'].sharding == new['split'].sharding and copied['host'] is host
    places.append([shard.data.unsafe_buffer_pointer() for name in sorted(expected) if name != 'host'
                   for shard in copied[name].addressable_shards])
    assert not set(places[-1]) & set(addresses)
  assert places[0] == places[1] == places[2]
  assert jnp.issubdtype(copied['replicated'].dtype, jnp.bfloat16)


def test_a_save_waits_for_the_allocation_of_its_memory(tmp_path, monkeypatch):
  reserve, values = HostStaging.reserve, jnp.arange(1, 65, dtype=jnp.float32)

  def slowly(self, state):
    touch = reserve(self, state)
    return lambda: [time.sleep(0.5), touch()][1]

  monkeypatch.setattr(HostStaging, 'reserve', slowly)
  with Checkpoints(tmp_path / 'checkpoints', Retention()) as checkpoints:
    checkpoints.prepare({'a': values})
    checkpoints.save(Progress(3), {'a': values}, None)
    checkpoints.wait()
    restored, _ = checkpoints.restore(3, {'a': jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=values.sharding)})
  assert (restored['a'] == values).all()
