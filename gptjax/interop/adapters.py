"""Adapters as PEFT's files (`adapter_config.json`, `adapter_model.safetensors`), and merged into a run of their own."""

import contextlib
import dataclasses
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from gptjax import config as configs
from gptjax.checkpoint import BASE, PARAMETERS, REFERENCE, TEACHER, Checkpoints, Progress, Retention, keep_run, parameter_reader
from gptjax.config import Config, LoraConfig, MeshConfig, UserError, read_config
from gptjax.files import atomic_directory, read_json, write_json
from gptjax.interop.families import Tensor, family_for
from gptjax.interop.tensor_files import Entry, read_header
from gptjax.model import AbstractModel, stack_layers, stored_model, unstack_layers
from gptjax.sharding import make_mesh

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'

_KEY = re.compile(r'base_model\.model\.(.+)\.lora_([AB])\.weight')
_READ = ('r', 'lora_alpha', 'use_rslora', 'rank_pattern', 'alpha_pattern', 'peft_type')
_WITHOUT_EFFECT = (
  'task_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path', 'revision', 'inference_mode', 'target_modules', 'exclude_modules',
  'lora_dropout', 'fan_in_fan_out', 'layers_to_transform', 'layers_pattern', 'megatron_core', 'qalora_group_size', 'ensure_weight_tying')
"""Fields that do not change what the tensors of a trained adapter mean: their names say which layers they adapt."""
_HARMLESS: dict[str, tuple] = {'bias': ('none',), 'init_lora_weights': (True, False, 'gaussian', 'orthogonal', 'eva', 'mica')}
"""Fields of which some values have no effect; initializations under other names change the base."""


def export_adapters(workdir: Path, folder: Path, *, step: str = 'latest', base: str = '') -> str:
  """Writes the adapters of a run as a new folder that PEFT loads onto the exported base. Returns a summary as text.

  Where a published layer is several of ours (GPT-2's c_attn is q, k and v), its A has the rows of all their adapters, and its B has blocks.

  Args:
    step: of the checkpoint: latest, best or a number.
    base: name or folder of the base for PEFT, base_model_name_or_path.

  Raises:
    UserError: a run without adapters, no such checkpoint, or a model that no published family can describe.
  """
  config = read_config(workdir)
  if not config.lora.rank:
    raise UserError('--workdir', str(workdir), 'a run with adapters (lora.rank above 0)')
  if folder.exists():
    raise UserError('--folder', str(folder), 'a folder that does not exist yet')
  family, model = family_for(config.model, config.data.context), stored_model(config)
  found, number = _adapters(workdir, model, step)
  shapes, tensors, ranks, alphas = unstack_layers(model.base.shapes), dict[str, np.ndarray](), dict[str, int](), dict[str, float]()
  adapted, others = list[str](), list[str]()
  for tensor in family.tensors(config.model):
    module = tensor.name.removesuffix('.weight')
    parts = [tuple(found.get(name.replace('/kernel', f'/lora_{ab}')) for ab in 'ab') for name in tensor.parameters]
    count = sum(a is not None for a, _ in parts)
    (adapted if count else others).append(module)
    if not count:
      continue
    a, b = _joined(parts, [shapes[name].shape[-1] for name in tensor.parameters])
    tensors |= {f'base_model.model.{module}.lora_{ab}.weight': np.ascontiguousarray(x.T) for ab, x in (('A', a), ('B', b))}
    if count > 1:  # the same scale at a larger rank
      ranks[module] = count * config.lora.rank
      alphas[module] = config.lora.alpha * (math.sqrt(count) if config.lora.stabilized else count)
  values = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base or None, 'revision': None,
            'inference_mode': True, 'r': config.lora.rank, 'lora_alpha': config.lora.alpha, 'use_rslora': config.lora.stabilized,
            'lora_dropout': 0.0, 'bias': 'none', 'target_modules': _targets(adapted, others), 'rank_pattern': ranks,
            'alpha_pattern': alphas, 'fan_in_fan_out': family.model_type == 'gpt2', 'modules_to_save': None, 'init_lora_weights': True,
            'use_dora': False}
  with atomic_directory(folder, resumes=False) as out:
    assert out, 'the folder did not exist'
    write_json(out / CONFIG, values)
    save_file(tensors, out / WEIGHTS, {'format': 'pt'})
  size = sum(x.nbytes for x in tensors.values()) / 1e6
  return f'adapters of {len(adapted)} layers, step {number}, for {family.architecture}: {size:,.1f} MB'


def _adapters(workdir: Path, model: AbstractModel, step: str) -> tuple[dict[str, np.ndarray], int]:
  """The adapters of a checkpoint, by names of unstacked layers, and its step."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with contextlib.closing(Checkpoints(workdir / 'checkpoints', folders=(PARAMETERS,))) as checkpoints:
    number = checkpoints.resolve(step)
    found = checkpoints.restore_parameters(number, {
      name: jax.ShapeDtypeStruct(model.shapes[name].shape, model.shapes[name].dtype, sharding=sharding) for name in model.adapters})
  return unstack_layers({name: np.asarray(x) for name, x in found.items()}), number


def _joined(parts: list[tuple], widths: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """A [I, n r] and block-diagonal B [n r, O] of several layers with the same input and these widths; (None, None) has no adapter."""
  own = [a for a, _ in parts if a is not None]
  rank, columns = own[0].shape[1], np.cumsum([0, *widths])
  b = np.zeros((rank * len(own), columns[-1]), np.float32)
  for index, (part, column) in enumerate((b, column) for (_, b), column in zip(parts, columns) if b is not None):
    b[index * rank:(index + 1) * rank, column:column + part.shape[1]] = part
  return np.concatenate(own, 1), b


def _targets(adapted: list[str], others: list[str]) -> list[str]:
  """The shortest names by which PEFT finds the adapted modules: their last parts, if no other module has those."""
  last = {name.rpartition('.')[2] for name in adapted}
  return adapted if last & {name.rpartition('.')[2] for name in others} else sorted(last)


def import_adapters(folder: Path, base: Path, workdir: Path) -> str:
  """Makes a run of PEFT's adapters of the model in another run; the workdir appears complete or not at all. Returns a summary as text.

  Raises:
    UserError: files that are missing or damaged, a kind of adapter that we do not apply, or one of another model.
  """
  if workdir.exists():
    raise UserError('--workdir', str(workdir), 'a folder that does not exist yet')
  values, config = read_json(folder / CONFIG), read_config(base)
  _check(values, str(folder / CONFIG))
  if not (folder / WEIGHTS).exists():
    raise UserError('--folder', str(folder), f'a folder with {CONFIG} and {WEIGHTS}')
  if config.lora.rank:
    raise UserError('--base', str(base), 'a run without adapters: python -m tools.merge_lora makes one of it')
  tensors = {tensor.name: tensor for tensor in family_for(config.model, config.data.context).tensors(config.model)}
  found: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}  # A, B and their scale, of each of our matrices
  for module, a, b in _modules(folder / WEIGHTS):
    tensor = next((tensors[name] for name in tensors if f'{module}.weight' in (name, name.partition('.')[2])), None)
    if tensor is None or tensor.expert is not None or not tensor.parameters[0].startswith('blocks/'):
      raise UserError(str(folder / WEIGHTS), module, f'linear layers of the model in {base}', [*tensors])
    found |= _parts(f'{folder / WEIGHTS}: {module}', a, b, _scale(values, module, len(a)), tensor, config)
  rank = max(a.shape[1] for a, _, _ in found.values())
  stabilized, alpha = bool(values.get('use_rslora')), float(values['lora_alpha'])
  lora = LoraConfig(rank, alpha, stabilized, tuple(_patterns([*found], config.model.layers)))
  config = dataclasses.replace(config, lora=lora, init_from=str(base.absolute()), init_partial=False, frozen=(),
                               optimizer=dataclasses.replace(config.optimizer, name='adamw'))  # muon trains no adapters
  with atomic_directory(workdir, resumes=False) as out:
    assert out, 'the workdir did not exist'
    model, parameters = stored_model(config), {}
    for name, (a, b, scale) in found.items():  # a smaller rank is filled with zeros
      more = [(0, 0), (0, rank - a.shape[1])]
      parameters[name.replace('/kernel', '/lora_a')] = np.pad(a, more)
      parameters[name.replace('/kernel', '/lora_b')] = np.pad(b * np.float32(scale / lora.scale), more[::-1])
    parameters = stack_layers(parameters) if model.is_stacked else parameters
    with contextlib.closing(parameter_reader(base / 'checkpoints', config_of_base := read_config(base))) as checkpoints:
      keep_run(checkpoints.folder(checkpoints.resolve('latest')), config_of_base, out / BASE)
    _write_run(out, config, base, {name: jax.numpy.asarray(parameters[name]) for name in sorted(model.adapters)})
  return f'adapters of {len(found)} matrices, rank {rank}, {sum(x.size for x in parameters.values()):,} parameters'


def _check(values: dict[str, Any], file: str) -> None:
  if values.get('peft_type') != 'LORA':
    raise UserError(f'{file}: peft_type', values.get('peft_type'), 'LORA')
  for name in ('r', 'lora_alpha'):
    if not isinstance(value := values.get(name), int | float) or value <= 0:
      raise UserError(f'{file}: {name}', value, 'a number above 0')
  for name in ('rank_pattern', 'alpha_pattern'):
    if not _are_patterns(values.get(name) or {}):
      raise UserError(f'{file}: {name}', values[name], 'an object of numbers above 0, by regular expressions')
  for name, value in values.items():
    allowed = _HARMLESS.get(name, (None, False, {}, []))
    if name not in (*_READ, *_WITHOUT_EFFECT) and value not in allowed:
      raise UserError(f'{file}: {name}', value, f'{", ".join(map(repr, allowed))}: gptjax applies plain LoRA and rsLoRA alone')


def _are_patterns(found: Any) -> bool:
  try:
    return isinstance(found, dict) and all(re.compile(key) and isinstance(value, int | float) and value > 0 for key, value in found.items())
  except re.error:
    return False


def _modules(file: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """The name of each adapted module, its A [r, I] and its B [O, r], in float32."""
  entries: dict[str, dict[str, Entry]] = {}
  for name, entry in read_header(file).items():
    match = _KEY.fullmatch(name)
    if match is None:
      raise UserError(str(file), name, 'tensors of plain LoRA: base_model.model.MODULE.lora_A.weight and lora_B.weight')
    entries.setdefault(match[1], {})[match[2]] = entry
  if not entries:
    raise UserError(str(file), 'no tensors', 'adapters of one layer or more')
  for module, pair in entries.items():
    if len(pair) < 2 or any(len(entry.shape) != 2 for entry in pair.values()) or pair['A'].shape[0] != pair['B'].shape[1]:
      raise UserError(f'{file}: {module}', {name: list(entry.shape) for name, entry in pair.items()},
                      'A [rank, inputs] and B [outputs, rank]')
    yield module, pair['A'].view().astype(np.float32), pair['B'].view().astype(np.float32)


def _scale(values: dict[str, Any], module: str, rank: int) -> float:
  patterns = values.get('alpha_pattern') or {}
  alpha = next((patterns[key] for key in patterns if re.fullmatch(rf'(.*\.)?({key})', module)), values['lora_alpha'])
  return alpha / (math.sqrt(rank) if values.get('use_rslora') else rank)


def _parts(place: str, a: np.ndarray, b: np.ndarray, scale: float, tensor: Tensor,
           config: Config) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
  """A [I, r], B [r, O] and their scale of each of our matrices that a module is made of; those that B leaves at zero have none."""
  shapes = unstack_layers(stored_model(config).base.shapes)
  widths = [shapes[name].shape[-1] for name in tensor.parameters]
  wanted = (len(b), a.shape[1]), (sum(widths), shapes[tensor.parameters[0]].shape[0])
  if wanted[0] != wanted[1]:
    raise UserError(place, list(wanted[0]), f'{list(wanted[1])}, outputs and inputs of this layer in the model')
  columns = np.cumsum([0, *widths])
  parts = {name: (a.T, b[start:stop].T, scale) for name, start, stop in zip(tensor.parameters, columns, columns[1:])}
  return parts if len(parts) == 1 else {name: part for name, part in parts.items() if part[1].any()} or parts


def _patterns(names: list[str], layers: int) -> list[str]:
  """Patterns of lora.targets for these matrices."""
  by_pattern: dict[str, list[str]] = {}
  for name in names:
    by_pattern.setdefault(re.sub(r'blocks/\d+/', 'blocks/*/', name), []).append(name)
  return [one for pattern, found in by_pattern.items() for one in ([pattern] if len(found) == layers else found)]


def merge_adapters(workdir: Path, out: Path, step: str = 'latest') -> str:
  """Makes a run without adapters whose parameters are those of a run with them, merged in float32. Returns a summary as text.

  Raises a UserError for a run without adapters, or no such checkpoint.
  """
  config = read_config(workdir)
  if not config.lora.rank:
    raise UserError('--workdir', str(workdir), 'a run with adapters (lora.rank above 0)')
  if out.exists():
    raise UserError('--out', str(out), 'a folder that does not exist yet')
  mesh, model = make_mesh(MeshConfig()), stored_model(config).base
  shardings = model.shardings(3, mesh)
  with contextlib.closing(parameter_reader(workdir / 'checkpoints', config)) as checkpoints:
    number = checkpoints.resolve(step)
    parameters = checkpoints.restore_parameters(number, {
      name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name]) for name, shape in model.shapes.items()})
  with atomic_directory(out, resumes=False) as folder:
    assert folder, 'the folder did not exist'
    _write_run(folder, dataclasses.replace(config, lora=LoraConfig()), workdir, parameters)
  return f'merged step {number} of {workdir}: {sum(x.size for x in parameters.values()):,} parameters'


def _write_run(folder: Path, config: Config, source: Path, parameters: dict[str, jax.Array]) -> None:
  """Writes config, the tokenizer and validation sets of another run, and parameters as the checkpoint of step 0."""
  (folder / 'config.json').write_text(configs.to_json(config))
  shutil.copytree(source / 'data', folder / 'data')
  for name in (REFERENCE, TEACHER):
    if (source / name).exists():
      shutil.copytree(source / name, folder / name)
  extra = tuple(folder / name for name in ('config.json', 'data/identity.json', 'data/tokenizer'))
  with contextlib.closing(Checkpoints(folder / 'checkpoints', Retention(), extra)) as checkpoints:
    checkpoints.save(Progress(), {'trained': parameters}, None, waits=True)
