"""A folder of Hugging Face's becomes a run: config, tokenizer, and a checkpoint at step 0."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress, Retention
from gptjax.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, UserError
from gptjax.data import Prepared, Tokenizer, export, load_tokenizer
from gptjax.data.progress import Work
from gptjax.files import atomic_directory, write_json
from gptjax.interop.comparison import Agreement, Check, compare_tensors, our_logits, their_logits
from gptjax.interop.families import described
from gptjax.interop.folders import CONFIG, copy_words, has_tokenizer, read_object, read_tensors
from gptjax.interop.matching import Match, check, match
from gptjax.interop.tensor_files import Entry, create, fill
from gptjax.model import Parameters, abstract_model
from gptjax.sharding import check_heads, make_mesh

KEPT, RECORD, BUFFERS = 'hf', 'gptjax.json', 'buffers.safetensors'
"""In a workdir: the folder of what our config and checkpoint cannot say; in it, the types of tensors, and those without parameters."""


BATCH_TOKENS = 2**14
"""Most tokens of a batch that scores documents, unless one row is longer."""


@dataclasses.dataclass(frozen=True)
class Import:
  """How a folder is taken in."""

  context: int = 0
  """tokens a row; 0: as many as the model is meant for"""
  scan: bool = False
  """stack the layers, as compute.scan has them"""
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """precision of matrix products and activations, as compute.dtype"""
  mesh: MeshConfig = MeshConfig()
  """devices that share the parameters"""
  tokenizer: Path | None = None
  """folder of another tokenizer than the model's own"""
  check: Check = Check()


def import_folder(folder: Path, workdir: Path, options: Import) -> str:
  """Makes a run of a folder; the workdir appears whole or not at all. Returns what was made and found, in words.

  Args:
    folder: config.json, safetensors and a tokenizer.
    workdir: must not be there yet.
    options: of the import.

  Raises:
    UserError: anything about the folder that is missing, damaged or cannot be done, or a check that fails.
  """
  if workdir.exists():
    raise UserError('--workdir', str(workdir), 'a folder that there is not yet')
  if not folder.is_dir():
    raise UserError('--folder', str(folder), f'a folder with {CONFIG} and safetensors')
  values = read_object(folder / CONFIG)
  kind, model, positions = described(values, str(folder / CONFIG))
  if not 0 <= options.context <= positions:
    raise UserError('--context', options.context, f'1 to {positions:,}, the positions of the model, or 0 for all')
  context = options.context or positions
  config = Config(model=model, compute=ComputeConfig(scan=options.scan, dtype=options.dtype), data=DataConfig(context=context),
                  batch_size=max(1, min(Config().batch_size, BATCH_TOKENS // context)), mesh=MeshConfig(model=options.mesh.model))
  entries = read_tensors(folder)
  matched = match(kind, abstract_model(config.model, config.compute, config.data.context), positions, entries)
  others = check(matched, kind, str(folder), entries)
  tokenizer = _tokenizer(folder, options.tokenizer, config.model)
  chosen = options.check.chosen()
  tokens = chosen.tokens(tokenizer, matched.plan)
  mesh = make_mesh(options.mesh)
  check_heads(config.model, mesh)
  with atomic_directory(workdir, resumes=False) as out:
    assert out, 'the workdir was not there'
    (out / 'config.json').write_text(configs.to_json(config))
    export(Prepared(tokenizer, (), {}, {}, tokenizer.sha256, 'none: imported'), out / 'data')
    _keep(folder, out / KEPT, matched, entries, others, own_tokenizer=options.tokenizer is None)
    parameters = load(matched, mesh, entries)
    ours = our_logits(matched.plan, parameters, mesh, tokens) if chosen.kind == 'transformers' else None
    with contextlib.closing(Checkpoints(out / 'checkpoints', Retention())) as checkpoints:
      checkpoints.save(Progress(), {'parameters': parameters}, None)
      checkpoints.wait()
    count = sum(parameter.size for parameter in parameters.values())
    del parameters
    found = []
    if chosen.kind != 'none':
      with contextlib.closing(Checkpoints(out / 'checkpoints')) as checkpoints:
        found.append(compare_tensors(checkpoints, 0, matched, mesh, entries))
    if ours is not None:
      found.append(Agreement.of(ours, their_logits(folder, tokens)).report(chosen.tolerance))
  return '\n'.join([f'{kind.architecture}, {count:,} parameters, context {config.data.context:,}', *found])


def load(matched: Match, mesh: Mesh, entries: Mapping[str, Entry]) -> Parameters:
  """Builds all parameters on the mesh, each device's part out of the part of the file that it is."""
  shapes, shardings = matched.plan.shapes, matched.plan.shardings(3, mesh)
  parameters = {}
  with Work('read', sum(4 * shape.size for shape in shapes.values()), 'bytes') as work:
    # The largest first: what a parameter takes beside itself while it is made, is then taken where there are few others.
    for name in sorted(shapes, key=lambda name: -shapes[name].size):
      parameters[name] = jax.block_until_ready(jax.make_array_from_callback(
        shapes[name].shape, shardings[name], lambda index: matched.read(entries, name, index or ())))
      work.advance(4 * shapes[name].size)
  return {name: parameters[name] for name in shapes}


def _tokenizer(folder: Path, other: Path | None, model: ModelConfig) -> Tokenizer:
  if other is None and not has_tokenizer(folder):
    raise UserError('--tokenizer', None, f"a tokenizer's folder: {folder} has no tokenizer")
  tokenizer = load_tokenizer(other or folder)
  if tokenizer.vocab_size > model.vocab_size:
    raise UserError('--tokenizer', f'{tokenizer.vocab_size:,} ids in {other or folder}', f'at most the {model.vocab_size:,} of the model')
  return tokenizer


def _keep(folder: Path, kept: Path, matched: Match, entries: Mapping[str, Entry], others: list[str], own_tokenizer: bool) -> None:
  """Keeps of a folder what its export needs: its words, the types of its tensors, and tensors that hold no parameter."""
  kept.mkdir()
  copy_words(folder, kept, tokenizer=own_tokenizer)
  record = {'dtypes': {tensor.name: entries[tensor.name].dtype for tensor in matched.tensors}, 'tokenizer': own_tokenizer}
  write_json(kept / RECORD, record)
  if others:
    for name, entry in create(kept / BUFFERS, {name: entries[name] for name in others}).items():
      fill(entry, entries[name].view())
