"""How arrays are placed on a mesh of devices: the mesh, the rules from logical axes to mesh axes, local rows, and ZeRO."""

from gptjax.sharding.mesh import (
  AnyMesh, abstract_mesh, batch_shards, check_heads, check_sizes, describe, folded, gathered, make_mesh, mesh_sizes, unfolded,
  viewed)
from gptjax.sharding.batch import (
  BATCH_SPEC, TOKENS_SPEC, batch_psum, batch_shard_map, manual_psum, padded_batch_size, process_rows, put_rows, row_numbers,
  tensor_shard_map, tokens_psum)
from gptjax.sharding.context import EXCHANGES, context_size, token_order, token_places
from gptjax.sharding.rules import RULES, Axis, ParameterSpecs, Shard, divisible, parameter_specs, spec, unsharded_axes
from gptjax.sharding.schedules import SCHEDULES, Operation, Schedule, make_schedule
from gptjax.sharding.places import Places, Tick, assign_places
from gptjax.sharding.zero import Factors, Weight, Zero, as_weight, shared
