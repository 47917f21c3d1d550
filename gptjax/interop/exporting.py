"""A run becomes a folder of Hugging Face's: one that was imported the one it came as, one trained here a folder of its family."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints, read_config
from gptjax.config import Config, MeshConfig, UserError
from gptjax.data import Tokenizer, load_tokenizer
from gptjax.data.progress import Work
from gptjax.files import atomic_directory, write_json
from gptjax.interop.comparison import Agreement, Check, compare_tensors, our_logits, restored, their_logits
from gptjax.interop.families import Family, comparable, described, family_for
from gptjax.interop.folders import CONFIG, GENERATION, Writer, copy_words, read_object, read_tensors
from gptjax.interop.importing import BUFFERS, KEPT, RECORD, load
from gptjax.interop.matching import Match, match
from gptjax.interop.tensor_files import Entry, read_header
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh

DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
"""Types of exported tensors, and what files call them."""


@dataclasses.dataclass(frozen=True)
class Export:
  """How a run is given out."""

  step: str = 'latest'
  """checkpoint: latest, best or a number"""
  dtype: str = 'auto'
  """of tensors, one of DTYPES; auto: as they were imported, float32 where the run was trained here"""
  shard_bytes: int = 5_000_000_000
  """most bytes of tensors in a file"""
  check: Check = Check()


def export_run(workdir: Path, folder: Path, options: Export) -> str:
  """Writes a run's checkpoint as a folder, which appears whole or not at all. Returns what was made and found, in words.

  Args:
    workdir: of a run.
    folder: must not be there yet.
    options: of the export.

  Raises:
    UserError: no such checkpoint, a model that no family can say, or a check that fails.
  """
  if folder.exists():
    raise UserError('--folder', str(folder), 'a folder that there is not yet')
  config, kept = read_config(workdir), workdir / KEPT
  tokenizer = load_tokenizer(workdir / 'data' / 'tokenizer')
  imported: dict[str, Any] = read_object(kept / RECORD) if kept.exists() else {'dtypes': {}, 'tokenizer': False}
  kind, values = _described(config, kept, tokenizer, options.dtype)
  matched = match(kind, abstract_model(config.model, config.compute, config.data.context), config.data.context, imported['dtypes'])
  dtype = lambda name: imported['dtypes'].get(name, 'F32') if options.dtype == 'auto' else DTYPES[options.dtype]
  tensors = {tensor.name: Entry(dtype(tensor.name), matched.shape(tensor)) for tensor in matched.tensors}
  buffers = read_header(kept / BUFFERS) if (kept / BUFFERS).exists() else {}
  chosen = options.check.chosen()
  tokens = chosen.tokens(tokenizer, matched.plan)
  mesh = make_mesh(MeshConfig())
  with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints, atomic_directory(folder, resumes=False) as out:
    assert out, 'the folder was not there'
    step = checkpoints.resolve(options.step)
    _write_words(out, kept, values, tokenizer, imported['tokenizer'])
    _write_tensors(out, checkpoints, step, matched, mesh, tensors, buffers, options.shard_bytes)
    entries = read_tensors(out)
    found = []
    if chosen.kind != 'none':
      found.append(compare_tensors(checkpoints, step, matched, mesh, entries))
    if chosen.kind == 'transformers':
      ours = our_logits(matched.plan, load(matched, mesh, entries), mesh, tokens)
      found.append(Agreement.of(ours, their_logits(out, tokens)).report(chosen.tolerance))
  size = sum(entry.bytes for entry in entries.values())
  return '\n'.join([f'{kind.architecture}, step {step}, {len(entries)} tensors, {size / 1e6:,.1f} MB', *found])


def _described(config: Config, kept: Path, tokenizer: Tokenizer, dtype: str) -> tuple[Family, dict[str, Any]]:
  """The run's family, and its config.json."""
  context = config.data.context
  if not kept.exists():
    kind = family_for(config.model, context)
    ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': tokenizer.pad_id}
    return kind, {'architectures': [kind.architecture], 'model_type': kind.model_type,
                  'dtype': 'float32' if dtype == 'auto' else dtype} | kind.write(config.model, context) | ids
  values = read_object(kept / CONFIG)
  kind, model, _ = described(values, str(kept / CONFIG))
  was, now = comparable(model), comparable(config.model)
  for field in was:
    if was[field] != now[field]:
      raise UserError(f'model.{field}', now[field], f'{was[field]!r}, as the model was imported ({kept / CONFIG})')
  if dtype != 'auto':
    values['torch_dtype' if 'torch_dtype' in values else 'dtype'] = dtype
  if config.model.positions == 'learned':  # there may be fewer than there were
    values |= {name: value for name, value in kind.write(config.model, context).items() if name == 'n_positions'}
  return kind, values


def _write_words(out: Path, kept: Path, values: dict[str, Any], tokenizer: Tokenizer, own_tokenizer: bool) -> None:
  if kept.exists():
    copy_words(kept, out)
  else:
    write_json(out / GENERATION, {name: values[name] for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')})
  if not own_tokenizer:
    tokenizer.save_hugging_face(out)
  write_json(out / CONFIG, values)


def _write_tensors(out: Path, checkpoints: Checkpoints, step: int, matched: Match, mesh: Mesh, tensors: Mapping[str, Entry],
                   buffers: Mapping[str, Entry], shard_bytes: int) -> None:
  """Restores some parameters at a time, and writes the tensors that they are."""
  writer = Writer(out, {**tensors, **buffers}, shard_bytes)
  with Work('write', sum(entry.bytes for entry in tensors.values()), 'bytes') as work:
    for names, group in matched.groups():
      parameters = restored(checkpoints, step, matched.plan, mesh, names)
      for tensor in group:
        writer.write(tensor.name, matched.write(jax.block_until_ready(parameters), tensor, tensors[tensor.name].dtype))
        work.advance(tensors[tensor.name].bytes)
  for name, entry in buffers.items():
    writer.write(name, entry.view())
  writer.finish()
