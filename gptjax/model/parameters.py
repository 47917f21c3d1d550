"""A model's parameters as plain data: one flat dict from 'blocks/0/attention/q/kernel' to an array.

The layouts of their layers: layout.py.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import LAYERS_AXIS, ComputeConfig, Config, LoraConfig, ModelConfig, UserError
from gptjax.model.layout import Slots, deal_layers, stack_layers, unstack_layers
from gptjax.model.layers import Linear
from gptjax.model.transformer import Block, Transformer, block_of
from gptjax.model.weights import initial_values
from gptjax.sharding import AnyMesh, Axis, ParameterSpecs, Weight, Zero, parameter_specs, shared, unsharded_axes

Parameters = dict[str, jax.Array]
CLASSIFIER = 'classifier/kernel'


@dataclasses.dataclass(frozen=True)
class AbstractModel:
  """A transformer without its values: initialization, checkpoints, optimizer and counters are all derived from it."""

  config: ModelConfig
  compute: ComputeConfig
  context: int
  slots: Slots
  graph: Any = dataclasses.field(compare=False)
  variables: dict[str, tuple[tuple, nnx.Param]] = dataclasses.field(compare=False)
  is_transposed: bool = False
  lora: LoraConfig = LoraConfig()
  block: type[Block] = Block

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter."""
    return {name: v.get_value() for name, (_, v) in self.variables.items()}

  @property
  def axes(self) -> dict[str, tuple[Axis, ...]]:
    """Logical axes of every parameter."""
    return {name: v.get_metadata('axes') for name, (_, v) in self.variables.items()}

  @property
  def is_stacked(self) -> bool:
    """Whether a parameter of blocks is one array for all layers."""
    return self.compute.scan or bool(self.slots)

  def is_matrix(self, name: str) -> bool:
    """Whether a parameter of layers is read by products alone, which can hand on the factors of its gradient."""
    return name.endswith('kernel') and 'experts' not in self.axes[name]

  def input_of(self, name: str) -> str:
    """A name for what a matrix is multiplied with; matrices of the same one read the same array."""
    shared = self.variables[name][1].get_metadata('input')
    return f'{name.rsplit("/", 2)[0]}/{shared}' if shared else name

  @property
  def dtypes(self) -> dict[str, str]:
    """The dtype in which the model reads every parameter."""
    return {name: v.get_metadata('dtype') for name, (_, v) in self.variables.items()}

  def specs(self, zero_stage: int, mesh: AnyMesh) -> dict[str, ParameterSpecs]:
    """PartitionSpecs of every parameter, its gradient and its optimizer state."""
    return {name: parameter_specs(self.axes[name], shape.shape, zero_stage, self.dtypes[name] != shape.dtype, mesh)
            for name, shape in self.shapes.items()}

  def zero(self, zero_stage: int, mesh: AnyMesh) -> Zero:
    """How a stage of ZeRO handles the parameters inside a step."""
    return Zero(zero_stage, self.specs(zero_stage, mesh), self.dtypes)

  def unsharded(self, zero_stage: int, mesh: AnyMesh) -> tuple[float, list[str]]:
    """The fraction of the parameters' bytes that stays unsharded although an axis should split them, and the reasons in words."""
    sizes = {name: shape.size for name, shape in self.shapes.items()}
    found = {name: unsharded_axes(self.axes[name], shape.shape, zero_stage, mesh) for name, shape in self.shapes.items()}
    reasons: dict[str, dict[str, None]] = {}
    for name, axes in found.items():
      for axis, size in axes.items():  # the same parameter of all layers is named once
        reasons.setdefault(f'mesh.{axis}={mesh.shape[axis]} does not divide {size}', {})[re.sub(r'/\d+/', '/', name)] = None
    fraction = sum(sizes[name] for name, axes in found.items() if axes) / sum(sizes.values())
    return fraction, [f'{reason}: {", ".join(names)}' for reason, names in reasons.items()]

  def shardings(self, zero_stage: int, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter between steps."""
    return {name: NamedSharding(mesh, specs.stored) for name, specs in self.specs(zero_stage, mesh).items()}

  def matching(self, field: str, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that match one of some patterns such as 'tokens/*' or 'blocks/0/*'.

    Patterns are compared with names of unstacked layers, so that they mean the same with and without `compute.scan`. Raises a UserError
    that names `field` if a pattern matches nothing, or only some layers of a stacked parameter.
    """
    found = set()
    for pattern in patterns:
      matches = {name: [fnmatchcase(one, pattern) for one in self.unstacked_names(name)] for name in self.shapes}
      if not any(map(any, matches.values())):
        known = [one for name in self.shapes for one in self.unstacked_names(name)]
        raise UserError(field, pattern, "a pattern that matches parameters, such as 'tokens/*' or 'blocks/0/*'", known)
      if partly := next((name for name, one in matches.items() if any(one) and not all(one)), None):
        unstacked = f'mesh.{LAYERS_AXIS}=1: pipeline stages stack' if self.slots else 'compute.scan=False: a scan stacks'
        raise UserError(field, pattern, f'all layers or none of {partly}, or {unstacked} the layers')
      found |= {name for name, one in matches.items() if all(one)}
    return frozenset(found)

  def unstacked_names(self, name: str) -> list[str]:
    """The name of a parameter, or those of a stacked one's layers."""
    return [one for one in self._names(name) if one]

  def _names(self, name: str) -> list[str]:
    """The name of a parameter, or those of a stacked one's layers; '' where none is."""
    if 'layers' not in self.variables[name][1].get_metadata('axes'):
      return [name]
    return [name.replace('blocks/', f'blocks/{number}/', 1) if number >= 0 else '' for number in self.slots or range(self.config.layers)]

  def initialize(self, key: jax.Array, shardings: dict[str, NamedSharding]) -> Parameters:
    """Fresh parameters with these shardings, equal on every mesh, scanned or not; to be traced under jit."""
    variables = {name: (self._names(name), v) for name, (_, v) in self.variables.items()}
    draw = lambda key: initial_values(variables, shardings, key)
    # Explicit axes would draw complete parameters and cut them afterwards; with Auto axes each device draws its own part.
    return jax.sharding.auto_axes(draw, out_sharding=shardings)(key)

  def in_layout(self, parameters: Mapping[str, Any], slots: Slots = ()) -> dict[str, Any]:
    """Parameters, or other arrays named after them, with layers arranged as in this model; `slots`: of the stacks that they are in."""
    parameters = unstack_layers(parameters, slots)
    return stack_layers(parameters, self.slots) if self.is_stacked else parameters

  def merge(self, parameters: Mapping[str, jax.Array | Weight]) -> Transformer:
    """The module with these values; free of cost inside a traced function."""
    table = parameters['tokens/table']
    if self.config.head_is_table and isinstance(table, Weight) and table.shard:  # the embedding and the head read it
      parameters = {**parameters, 'tokens/table': shared(table, self.dtypes['tokens/table'])}
    flat = {path: variable.replace(parameters[name]) for name, (path, variable) in self.variables.items()}
    return nnx.merge(self.graph, nnx.from_flat_state(flat))

  @property
  def adapters(self) -> frozenset[str]:
    """Names of the parameters that adapters add."""
    return frozenset(name for name in self.shapes if name.endswith(('/lora_a', '/lora_b')))

  @property
  def trained_with_adapters(self) -> frozenset[str]:
    """Names of the parameters that a run with adapters trains: theirs, and the head of classes."""
    return self.adapters | (self.shapes.keys() & {CLASSIFIER})

  def frozen(self, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that match the patterns of Config.frozen, or of a model with adapters all that a run with them keeps."""
    return frozenset(self.shapes) - self.trained_with_adapters if self.lora.rank else self.matching('frozen', patterns)

  @property
  def base(self) -> 'AbstractModel':
    """The same model without adapters."""
    return abstract_model(self.config, self.compute, self.context, self.slots)

  def merged(self, parameters: Mapping[str, jax.Array]) -> Parameters:
    """Parameters of `base` that compute the same: each adapted W is W + scale * A B, added in float32, sharded as W is."""
    return {name: _merged(x, *(parameters[name.replace('/kernel', f'/lora_{ab}')] for ab in 'ab'), self.lora.scale)
            if name.replace('/kernel', '/lora_a') in self.adapters else x for name, x in parameters.items() if name not in self.adapters}

  def transposed(self) -> 'AbstractModel':
    """The same model with kernels stored as [output, input], as products of few rows read them best: on a CPU 8 rows took 31 ms where
    they took 41. Not for scanned layers, nor the stacked kernels of experts."""
    def turned(name, variable):
      value, axes = variable.get_value(), variable.get_metadata('axes')
      if not name.endswith('kernel') or 'experts' in axes:
        return variable
      return variable.replace(jax.ShapeDtypeStruct(value.shape[::-1], value.dtype), axes=axes[::-1], transposed=True)
    assert not self.is_stacked
    variables = {name: (path, turned(name, v)) for name, (path, v) in self.variables.items()}
    return dataclasses.replace(self, variables=variables, is_transposed=True)


@functools.partial(jax.jit, static_argnums=3)
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  a, b = (jax.reshard(x.astype('float32'), PartitionSpec()) for x in (a, b))
  product = jax.numpy.einsum('...ir,...ro->...io', a, b, out_sharding=jax.typeof(w).sharding.spec)
  return (w.astype('float32') + scale * product).astype(w.dtype)


def abstract_model(config: ModelConfig, compute: ComputeConfig, context: int, slots: Slots = (),
                   lora: LoraConfig = LoraConfig()) -> AbstractModel:
  """Describes the transformer of a config; nothing is computed or allocated. `slots`: those of layers that pipeline stages share out.

  Raises a UserError for a pattern of lora.targets that matches no linear layer inside blocks, and if there is no block of this name.
  """
  return _abstract_model(config, compute, context, slots, lora, block_of(config))


@functools.lru_cache(maxsize=64)  # a run asks some times, the search for a layout hundreds of times, and each takes 0.1 s
def _abstract_model(config, compute, context, slots, lora, block) -> AbstractModel:
  module = Transformer(config, compute, context, slots)
  if lora.rank:
    _adapt(module, abstract_model(config, compute, context, slots), lora)
  graph, state = nnx.split(module)
  return AbstractModel(config, compute, context, slots, graph,
                       {'/'.join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}, lora=lora, block=block)


def _adapt(module: Transformer, described: AbstractModel, lora: LoraConfig) -> None:
  linears = {'/'.join(map(str, path)) + '/kernel': one for path, one in nnx.iter_graph(module.blocks) if isinstance(one, Linear)}
  linears = {f'blocks/{name}': one for name, one in linears.items()}
  wanted: set[str] = set()
  for pattern in lora.targets:
    names = (one for name in linears for one in described.unstacked_names(name))
    if not any(fnmatchcase(one, pattern) for one in names) or not (found := described.matching('lora.targets', [pattern]) & linears.keys()):
      raise UserError('lora.targets', pattern, 'a pattern that matches matrices of linear layers inside blocks', list(linears))
    wanted |= found
  for name in sorted(wanted):
    linears[name].adapt(lora)


def model_of(config: Config) -> AbstractModel:
  """Describes the transformer of a run as its train state has it."""
  return abstract_model(config.model, config.compute, config.data.context, slots_of(config), config.lora)


def stored_model(config: Config) -> AbstractModel:
  """Describes the transformer of a run as its checkpoints have it: with layers in order, and stacked if the train state stacks them."""
  slots = tuple(range(config.model.layers)) if slots_of(config) else ()
  return abstract_model(config.model, config.compute, config.data.context, slots, config.lora)


def slots_of(config: Config) -> Slots:
  """The slots of a run's layers; () without pipeline stages. Raises a UserError if there are more stages than layers."""
  stages, chunks, model = config.mesh.sizes[LAYERS_AXIS], config.pipeline.chunks, config.model
  if stages == 1:
    return ()
  if model.expert_every > 1:
    raise UserError(f'mesh.{LAYERS_AXIS}', stages, '1 with model.expert_every above 1, since the layers of a stage are alike')
  if stages * chunks > model.layers:
    field, value = ('pipeline.chunks', chunks) if stages <= model.layers else (f'mesh.{LAYERS_AXIS}', stages)
    raise UserError(field, value, f'at most model.layers={model.layers} chunks of layers in all stages together')
  shapes = abstract_model(model, ComputeConfig(scan=True), 1).shapes
  layers = sum(shape.size for name, shape in shapes.items() if name.startswith('blocks/') and name.endswith('kernel'))
  return deal_layers(model.layers, stages, chunks, model.layers * model.width * model.outputs / layers)


@functools.cache  # the search for a layout calls both many times
def parameter_count(config: ModelConfig, context: int) -> int:
  """Elements of all parameters; learned positions count, a tied head counts once."""
  return sum(shape.size for shape in abstract_model(config, ComputeConfig(), context).shapes.values())


def active_sizes(config: ModelConfig, context: int) -> dict[str, int | float]:
  """Elements of every parameter that one token uses: of the matrices of all experts, those of its own experts."""
  described = abstract_model(config, ComputeConfig(), context)
  share = config.experts_per_token / (config.experts or 1)
  return {name: shape.size * share if 'experts' in described.axes[name] else shape.size for name, shape in described.shapes.items()}


@functools.cache
def active_parameters(config: ModelConfig, context: int) -> int:
  """The `parameter_count` without the experts that a token does not use."""
  return round(sum(active_sizes(config, context).values()))


@functools.cache
def flops_per_token(config: ModelConfig, context: int, *, causal: bool = True) -> int | float:
  """FLOPs of a forward and backward pass per token of rows of `context` tokens.

  A multiply and an add are two FLOPs; the backward pass costs twice the forward; only matrix products count: 6 per weight of every
  matrix that the token passes (embedding lookups pass none; of the experts, its own), and 3 times the `attention_flops`.
  """
  matrix = lambda name: name.endswith('kernel') or (config.head_is_table and name == 'tokens/table')
  weights = sum(size for name, size in active_sizes(config, context).items() if matrix(name))
  return 6 * weights + 3 * attention_flops(config, context, causal=causal)


def step_flops(model: AbstractModel, frozen: Collection[str]) -> int | float:
  """`flops_per_token` of a model with adapters, and without the gradients of frozen matrices: 2 less per weight."""
  share = model.config.experts_per_token / (model.config.experts or 1)
  sizes = {name: shape.size * (share if 'experts' in model.axes[name] else 1) for name, shape in model.shapes.items()}
  matrix = lambda name: name.endswith('kernel') or (model.config.tied and name == 'tokens/table')
  return (flops_per_token(model.config, model.context) + 6 * sum(sizes[name] for name in model.adapters)
          - 2 * sum(sizes[name] for name in frozen if matrix(name)))


def attention_flops(config: ModelConfig, context: int, *, causal: bool = True) -> int | float:
  """FLOPs per token of the scores and the mixing of all layers in the forward pass: 4 * heads * head width * keys per layer.

  `causal` counts the keys that a token can see, (context + 1) / 2 on average or fewer with a window; otherwise the full square, as
  PaLM (arXiv:2204.02311, appendix B) and nanoGPT do.
  """
  def keys(layer):
    seen = context if config.sees_all(layer) else min(context, config.window)
    return (seen * (seen + 1) / 2 + (context - seen) * seen) / context if causal else context
  return 4 * config.heads * config.head_width * sum(map(keys, range(config.layers)))


def repeated_products(config: ModelConfig, compute: ComputeConfig) -> set[str]:
  """The matrices of a block whose products the backward pass repeats, because remat does not keep their results."""
  if compute.remat == 'none':
    return set()
  results = {'q': 'q', 'k': 'k', 'v': 'v', 'out': 'attention_out', 'gate': 'gate', 'up': 'up'}
  last = set() if config.norm_at == 'pre' else {'down'}  # whose result only a norm after it reads
  return {matrix for matrix, result in results.items() if result not in compute.kept} | last


@functools.cache
def repeated_weights(config: ModelConfig, compute: ComputeConfig) -> int | float:
  """Elements of the `repeated_products` of all layers that a token uses."""
  repeated = repeated_products(config, compute)
  return sum(size for name, size in active_sizes(config, 1).items() if name.endswith('kernel') and name.split('/')[-2] in repeated)
