"""The sharding room: the mesh and its axis names, the table from logical to mesh axes, and the ZeRO rule."""

from gptjax.sharding.mesh import AXES, AnyMesh, check_heads, check_sizes, describe, make_mesh, row_groups
from gptjax.sharding.rules import RULES, Axis, Places, my_rows, place, place_rows, places, spec, undivided

__all__ = [
  'AXES', 'RULES', 'AnyMesh', 'Axis', 'Places', 'check_heads', 'check_sizes', 'describe', 'make_mesh', 'my_rows', 'place', 'place_rows',
  'places', 'row_groups', 'spec', 'undivided',
]
