"""Exports a run as a Hugging Face folder: an imported run in its original form, a run trained here as a folder of its family."""

import contextlib
from pathlib import Path
from typing import Any

from gptjax.checkpoint import parameter_reader
from gptjax.config import Config, MeshConfig, UserError, read_config
from gptjax.data import Tokenizer, load_tokenizer
from gptjax.data.tokenizers.export import write_plain_chat
from gptjax.files import atomic_directory, read_json, write_json
from gptjax.interop.comparison import Check, compare_logits, compare_tensors, for_each_tensor, our_logits, their_logits
from gptjax.interop.families import Family, comparable, family_for, parse_config
from gptjax.interop.importing import BUFFERS, CONFIG, GENERATION, KEPT, RECORD, copy_text_files, load_parameters
from gptjax.interop.matching import match
from gptjax.interop.tensor_files import Entry, Writer, read_header, read_tensors
from gptjax.model import stored_model
from gptjax.sharding import make_mesh

DTYPES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
"""Dtypes of exported tensors, and their names in safetensors files."""


def export_run(workdir: Path, folder: Path, *, step: str = 'latest', dtype: str = 'auto', shard_bytes: int = 5_000_000_000,
               check: Check = Check()) -> str:
  """Writes a run's checkpoint as a new folder, which appears complete or not at all. Returns a summary as text.

  Args:
    step: of the checkpoint: latest, best or a number.
    dtype: of the tensors, one of DTYPES; auto: as they were imported, or float32 if the run was trained here.
    shard_bytes: maximum bytes of tensors per file.

  Raises:
    UserError: no such checkpoint, a model that no published family can describe, or a check that fails.
  """
  if folder.exists():
    raise UserError('--folder', str(folder), 'a folder that does not exist yet')
  config, kept = read_config(workdir), workdir / KEPT
  tokenizer = load_tokenizer(workdir / 'data' / 'tokenizer')
  imported: dict[str, Any] = read_json(kept / RECORD) if kept.exists() else {'dtypes': {}, 'tokenizer': False}
  family, values = _described(config, kept, tokenizer, dtype)
  matched = match(family, stored_model(config).base, config.data.context, imported['dtypes'])
  tensors = {tensor.name: Entry(imported['dtypes'].get(tensor.name, 'F32') if dtype == 'auto' else DTYPES[dtype], matched.shape(tensor))
             for tensor in matched.tensors}
  buffers = read_header(kept / BUFFERS) if (kept / BUFFERS).exists() else {}
  chosen = check.resolved()
  tokens = chosen.tokens(tokenizer, matched.model, values)
  mesh = make_mesh(MeshConfig())
  reader = parameter_reader(workdir / 'checkpoints', config)
  with contextlib.closing(reader) as checkpoints, atomic_directory(folder, resumes=False) as out:
    assert out, 'the folder did not exist'
    number = checkpoints.resolve(step)
    if kept.exists():
      copy_text_files(kept, out)
    else:
      write_json(out / GENERATION, {name: values[name] for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')})
    if not imported['tokenizer']:
      tokenizer.save_hugging_face(out)
    if tokenizer.plain_chat:
      write_plain_chat(out, bool(tokenizer.start_ids))
    write_json(out / CONFIG, values)
    writer = Writer(out, {**tensors, **buffers}, shard_bytes)
    for_each_tensor('write', lambda tensor, value: writer.write(tensor.name, value), checkpoints, number, matched, mesh, tensors)
    for name, entry in buffers.items():
      writer.write(name, entry.view())
    writer.finish()
    entries = read_tensors(out)
    size = sum(entry.bytes for entry in entries.values())
    summary = [f'{family.architecture}, step {number}, {len(entries)} tensors, {size / 1e6:,.1f} MB']
    if chosen.kind != 'none':
      summary.append(compare_tensors(checkpoints, number, matched, mesh, entries))
    if chosen.kind == 'transformers':
      ours = our_logits(matched.model, load_parameters(matched, mesh, entries), mesh, tokens)
      summary.append(compare_logits(ours, their_logits(out, tokens), chosen.tolerance))
  return '\n'.join(summary)


def _described(config: Config, kept: Path, tokenizer: Tokenizer, dtype: str) -> tuple[Family, dict[str, Any]]:
  """The run's family and its config.json."""
  context = config.data.context
  if not kept.exists():
    kind = family_for(config.model, context)
    pad_id = tokenizer.pad_id if tokenizer.pad_id < config.model.vocab_size else tokenizer.eos_id  # transformers pads by a row of the table
    ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': pad_id}
    return kind, {'architectures': [kind.architecture], 'model_type': kind.model_type,
                  'torch_dtype': 'float32' if dtype == 'auto' else dtype} | kind.write(config.model, context) | ids
  values = read_json(kept / CONFIG)
  kind, model, _ = parse_config(values, str(kept / CONFIG))
  was, now = comparable(model), comparable(config.model)
  for field in was:
    if was[field] != now[field]:
      raise UserError(f'model.{field}', now[field], f'{was[field]!r}, as in the imported model ({kept / CONFIG})')
  if dtype != 'auto':
    values |= dict.fromkeys({'dtype', 'torch_dtype'} & values.keys() or ('torch_dtype',), dtype)
  if config.model.positions == 'learned':
    values['n_positions'] = context  # the run's may be shorter than the model's
  return kind, values
