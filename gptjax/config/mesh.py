"""The table of mesh axes: what each one divides, and over which network. Mesh, sharding rules, checks, plans and reports read it."""

import dataclasses
from typing import Annotated, Any, Literal

from gptjax.config.checks import Fraction, Group, Limit, Positive, UserError

REST = -1
"""Size of an axis that takes all remaining devices."""


@dataclasses.dataclass(frozen=True)
class MeshAxis:
  """One axis of the device mesh."""

  name: str
  default: int
  """its size in MeshConfig"""
  help: str
  """help text of its field"""
  batch: bool = False
  """whether it divides the batch: devices along it process different rows"""
  state: bool = False
  """whether ZeRO shards parameters, gradients and optimizer state along it; exactly one axis does"""
  splits: str = ''
  """what else it divides: 'matrices' (tensor parallelism), 'layers', 'tokens' of a row, or 'experts'; one axis at most for each"""
  crosses_slices: bool = False
  """whether it may cross the network between TPU slices, or between nodes; others do only if no axis that may is left"""


AXES = (
  MeshAxis('replica', 1, 'number of groups of devices; each holds the complete state and processes different rows of the batch, and only '
           'gradients cross the slower network between them (between TPU slices)', batch=True, crosses_slices=True),
  MeshAxis('pipe', 1, 'number of pipeline stages, which hold and compute different layers', splits='layers'),
  MeshAxis('data', REST, 'number of devices per group that process different rows of the batch; zero_stage shards state over them; -1: all '
           'that the other axes leave', batch=True, state=True),
  MeshAxis('expert', 1, 'number of devices over which the experts of a layer are distributed; they process different rows of the batch',
           batch=True, splits='experts'),
  MeshAxis('context', 1, 'number of devices over which the tokens of each row are divided', splits='tokens'),
  MeshAxis('model', 1, 'number of devices over which each matrix is split (tensor parallelism)', splits='matrices'),
)
"""From the slowest network to the fastest."""

AXIS_NAMES = tuple(axis.name for axis in AXES)
BATCH_AXES = tuple(axis.name for axis in AXES if axis.batch)
"""Axes that divide the batch."""
(STATE_AXIS,) = (axis.name for axis in AXES if axis.state)
(REST_AXIS,) = (axis.name for axis in AXES if axis.default == REST)
SLICE_AXES = tuple(axis.name for axis in AXES if axis.crosses_slices)
"""Axes that may cross the network between slices."""
_axis_that_splits = {axis.splits: axis.name for axis in AXES if axis.splits}
TENSOR_AXIS, LAYERS_AXIS, TOKENS_AXIS, EXPERTS_AXIS = (_axis_that_splits[what] for what in ('matrices', 'layers', 'tokens', 'experts'))
LOCAL_AXES = tuple(axis.name for axis in AXES if axis.name != TENSOR_AXIS)
"""Axes over which the train step is manual: inside, each device sees its own rows, tokens, layers and experts."""

_Size = Annotated[int, Limit(lambda size: size == REST or size >= 1, '1 or more; -1 for one axis')]
_Sizes: Any = dataclasses.make_dataclass('_Sizes', [
  (axis.name, _Size, dataclasses.field(default=axis.default, metadata={'help': axis.help}))
  for axis in sorted(AXES, key=lambda axis: axis.name not in (STATE_AXIS, TENSOR_AXIS))], frozen=True)  # those set most often come first


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Sizes, Group, prefix='mesh.'):
  """How devices are arranged."""

  max_unsharded: Fraction = 0.02
  """largest fraction of the parameters' bytes that may stay unsharded because a mesh axis does not divide their sizes; more is an error"""

  def __post_init__(self):
    super().__post_init__()
    rest = [name for name, size in self.sizes.items() if size == REST]
    if len(rest) > 1:
      raise UserError(f'mesh.{rest[1]}', REST, f'a size: only one axis may be -1, and mesh.{rest[0]} is')

  @property
  def sizes(self) -> dict[str, int]:
    """Size of each axis, in the table's order."""
    return {name: getattr(self, name) for name in AXIS_NAMES}


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Group, prefix='pipeline.'):
  """The order of work of pipeline stages, if mesh.pipe is above 1; it does not change the results."""

  schedule: Literal['GPipe', '1F1B', 'Interleaved1F1B', 'ZBH1'] = '1F1B'
  """GPipe (arXiv:1811.06965): all forward, then all backward passes; 1F1B (arXiv:1806.03377): in turn, so that a stage keeps the \
activations of at most mesh.pipe microbatches; Interleaved1F1B (arXiv:2104.04473): 1F1B with several chunks of layers per stage, which \
idles less and sends more; ZBH1 (arXiv:2401.10241): 1F1B that computes gradients of weights where it would idle"""
  chunks: Positive = 1
  """chunks of consecutive layers per stage, for Interleaved1F1B"""

  def __post_init__(self):
    super().__post_init__()
    if self.chunks > 1 and self.schedule != 'Interleaved1F1B':
      raise UserError('pipeline.chunks', self.chunks, f"1 unless pipeline.schedule is 'Interleaved1F1B' (it is '{self.schedule}')")
