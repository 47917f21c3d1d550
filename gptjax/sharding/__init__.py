"""How arrays are placed on a mesh of devices: the mesh, the rules from logical axes to mesh axes, local rows, and ZeRO."""

from gptjax.sharding.mesh import AnyMesh, abstract_mesh, check_heads, check_sizes, describe, make_mesh, mesh_sizes, row_groups
from gptjax.sharding.rows import ROWS, full_groups, local_matrices, local_rows, process_rows, put_rows, row_numbers, sum_over_rows
from gptjax.sharding.rules import RULES, Axis, ParameterSpecs, Shard, divisible, parameter_specs, spec, unsharded_axes
from gptjax.sharding.zero import Weight, Zero, as_weight, shared
