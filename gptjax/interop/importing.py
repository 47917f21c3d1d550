"""Imports a Hugging Face folder as a run: config, tokenizer, and a checkpoint at step 0."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh
from safetensors.numpy import save_file

from gptjax import config as configs
from gptjax.checkpoint import PARAMETERS, Checkpoints, Progress, Retention
from gptjax.config import ComputeConfig, Config, DataConfig, MeshConfig, UserError
from gptjax.data import Prepared, Tokenizer, export, load_tokenizer
from gptjax.data.progress import ProgressBar, announce
from gptjax.data.tokenizers.subwords import OPENAI_FILES
from gptjax.files import atomic_directory, read_json, write_json
from gptjax.interop.comparison import Check, compare_logits, compare_tensors, our_logits, their_logits
from gptjax.interop.families import ignored_fields, parse_config
from gptjax.interop.matching import Match, check_tensors, match
from gptjax.interop.tensor_files import Entry, read_tensors
from gptjax.model import Parameters, abstract_model
from gptjax.sharding import check_heads, make_mesh

CONFIG, GENERATION = 'config.json', 'generation_config.json'
KEPT, RECORD, BUFFERS = 'hf', 'gptjax.json', 'buffers.safetensors'
"""In a workdir: the folder of everything that config and checkpoint cannot represent; in it, the tensors' dtypes, and the tensors that
hold no parameter."""

_VOCABULARY = ('tokenizer.json', 'vocab.json', 'vocab.txt', '*.model', '*.tiktoken')
"""Patterns of files; every tokenizer that transformers reads has at least one of them. OpenAI's own names are not among them: it would
read a folder that has only these as an empty tokenizer, so exports have the tokenizer's files under Hugging Face's names."""
_TOKENIZER = (*_VOCABULARY, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'chat_template*')
_TEXTS = (CONFIG, GENERATION, 'README.md', 'LICENSE*', 'USE_POLICY*')

MAX_BATCH_TOKENS = 2**14
"""Tokens per batch when the run scores documents, unless one row has more."""


def import_folder(folder: Path, workdir: Path, *, context: int = 0, scan: bool = False, dtype: Literal['float32', 'bfloat16'] = 'float32',
                  mesh: MeshConfig = MeshConfig(), tokenizer: Path | None = None, check: Check = Check()) -> str:
  """Makes a run from a folder; the workdir, which must not exist, appears complete or not at all. Returns a summary as text.

  Args:
    folder: config.json, safetensors and a tokenizer.
    context: tokens per row; 0: the context length of the model.
    scan: stack the layers, see compute.scan.
    dtype: of matrix products and activations, see compute.dtype.
    mesh: devices over which the parameters are sharded.
    tokenizer: folder of a tokenizer that replaces the model's own.

  Raises:
    UserError: something about the folder is missing, damaged or not supported, or the check fails.
  """
  if workdir.exists():
    raise UserError('--workdir', str(workdir), 'a folder that does not exist yet')
  config, matched, entries, buffers, loaded, architecture = open_folder(folder, context, scan, dtype, mesh, tokenizer)
  chosen = check.resolved()
  tokens = chosen.tokens(loaded, matched.model, read_json(folder / CONFIG))
  devices = make_mesh(mesh)
  check_heads(config.model, devices)
  with atomic_directory(workdir, resumes=False) as out:
    assert out, 'the workdir did not exist'
    (out / 'config.json').write_text(configs.to_json(config))
    export(Prepared(loaded, {}, {}, (), loaded.sha256, 'none: imported'), out / 'data')
    kept = out / KEPT
    kept.mkdir()
    own = tokenizer is None and bool(_matching(folder, _VOCABULARY))
    copy_text_files(folder, kept, tokenizer=own)
    dtypes = {tensor.name: entries[tensor.name].dtype for tensor in matched.tensors}
    write_json(kept / RECORD, {'dtypes': dtypes, 'tokenizer': own})
    if buffers:
      save_file({name: entries[name].view() for name in buffers}, kept / BUFFERS)
    parameters = load_parameters(matched, devices, entries)
    ours = our_logits(matched.model, parameters, devices, tokens) if chosen.kind == 'transformers' else None
    summary = [f'{architecture}, {sum(value.size for value in parameters.values()):,} parameters, context {config.data.context:,}']
    with contextlib.closing(Checkpoints(out / 'checkpoints', Retention())) as checkpoints:
      checkpoints.save(Progress(), {'trained': parameters}, None, waits=True)  # which needs no second copy in memory
      del parameters
    if chosen.kind != 'none':
      with contextlib.closing(Checkpoints(out / 'checkpoints', folders=(PARAMETERS,))) as checkpoints:
        summary.append(compare_tensors(checkpoints, 0, matched, devices, entries))
    if ours is not None:
      summary.append(compare_logits(ours, their_logits(folder, tokens), chosen.tolerance))
  return '\n'.join(summary)


class Opened(NamedTuple):
  """A folder whose files fit each other, before its tensors are read."""

  config: Config
  matched: Match
  entries: dict[str, Entry]
  buffers: list[str]  # tensors that hold no parameter
  tokenizer: Tokenizer
  architecture: str  # its name in transformers


def open_folder(folder: Path, context: int = 0, scan: bool = False, dtype: Literal['float32', 'bfloat16'] = 'float32',
                mesh: MeshConfig = MeshConfig(), tokenizer: Path | None = None) -> Opened:
  """Opens a folder for `load_parameters`, with the arguments and errors of `import_folder`."""
  if not folder.is_dir():
    raise UserError('--folder', str(folder), f'a folder with {CONFIG} and safetensors')
  values = read_json(folder / CONFIG)
  family, model, positions = parse_config(values, str(folder / CONFIG))
  if ignored := ignored_fields(values):
    announce(f'{folder / CONFIG}: ignored, as in transformers: {", ".join(ignored)}')
  if not 0 <= context <= positions:
    raise UserError('--context', context, f"1 to {positions:,}, the model's context length, or 0 for all of it")
  context = context or positions
  config = Config(model=model, compute=ComputeConfig(scan=scan, dtype=dtype), data=DataConfig(context=context),
                  batch_size=max(1, min(Config().batch_size, MAX_BATCH_TOKENS // context)), mesh=MeshConfig(model=mesh.model))
  entries = read_tensors(folder)
  matched = match(family, abstract_model(model, config.compute, context), positions, entries)
  buffers = check_tensors(matched, family, str(folder), entries)
  return Opened(config, matched, entries, buffers, _load_tokenizer(folder, tokenizer, model.vocab_size), family.architecture)


def _load_tokenizer(folder: Path, other: Path | None, vocab_size: int) -> Tokenizer:
  """The tokenizer of a model's folder, or of another one; raises a UserError if its texts have ids that the model lacks."""
  if other is None and not _matching(folder, (*_VOCABULARY, *OPENAI_FILES)):
    raise UserError(f'{folder}: tokenizer', None, f'one of {", ".join(_VOCABULARY)}, or that of another folder by --tokenizer of '
                    'tools.import_hf')
  tokenizer = load_tokenizer(other or folder)
  if tokenizer.largest_id >= vocab_size:
    raise UserError(f'{other or folder}: largest token id of a text', tokenizer.largest_id,
                    f'below {vocab_size:,}, the vocab_size in {folder / CONFIG}')
  return tokenizer


def load_parameters(matched: Match, mesh: Mesh, entries: Mapping[str, Entry]) -> Parameters:
  """Builds all parameters on the mesh; each device's part is read from the corresponding part of the files."""
  shapes, shardings = matched.model.shapes, matched.model.shardings(3, mesh)
  parameters = {}
  with ProgressBar('read', sum(4 * shape.size for shape in shapes.values()), 'bytes') as work:
    # The largest first: building one takes additional memory, of which most is free at the start.
    for name in sorted(shapes, key=lambda name: -shapes[name].size):
      parameters[name] = jax.block_until_ready(jax.make_array_from_callback(
        shapes[name].shape, shardings[name], lambda index: matched.read(entries, name, index or ())))
      work.advance(4 * shapes[name].size)
  return {name: parameters[name] for name in shapes}


def copy_text_files(source: Path, target: Path, tokenizer: bool = True) -> None:
  """Copies config, model card and licence of a folder, and with `tokenizer` the tokenizer's files."""
  for path in _matching(source, (*_TEXTS, *_TOKENIZER) if tokenizer else _TEXTS):
    (target / path.name).write_bytes(path.read_bytes())


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
  return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
