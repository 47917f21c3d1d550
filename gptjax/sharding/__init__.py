"""How arrays are placed on a mesh of devices: the mesh, the rules from logical axes to mesh axes, local rows, and ZeRO."""

from gptjax.sharding.mesh import AnyMesh, abstract_mesh, check_heads, check_sizes, describe, make_mesh, mesh_sizes, row_groups
from gptjax.sharding.rows import ROWS, full_groups, local_matrices, local_rows, process_rows, put_rows, row_numbers, sum_over_rows
from gptjax.sharding.rules import RULES, Axis, ParameterSpecs, Shard, parameter_specs, spec, unsharded_axes
from gptjax.sharding.zero import Weight, Zero, as_weight, shared

__all__ = [
  'ROWS', 'RULES', 'AnyMesh', 'Axis', 'ParameterSpecs', 'Shard', 'Weight', 'Zero', 'abstract_mesh', 'as_weight', 'check_heads',
  'check_sizes', 'describe', 'full_groups', 'local_matrices', 'local_rows', 'make_mesh', 'mesh_sizes', 'parameter_specs', 'process_rows',
  'put_rows', 'row_groups', 'row_numbers', 'shared', 'spec', 'sum_over_rows', 'unsharded_axes',
]
