"""Checks that a run and a folder are the same model: by their tensors, and by the logits that transformers computes."""

import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int
from scipy.special import log_softmax

from gptjax.checkpoint import Checkpoints
from gptjax.config import ComputeConfig, UserError
from gptjax.data import Tokenizer
from gptjax.data.progress import ProgressBar, announce
from gptjax.interop.families import Tensor
from gptjax.interop.fields import Json
from gptjax.interop.matching import Match, bits
from gptjax.interop.tensor_files import Entry
from gptjax.sharding import batch_shard_map
from gptjax.model import AbstractModel, Parameters, Positions, abstract_model

RELATIVE = 1e-4
"""Difference of logits that is always allowed, relative to the largest logit: float32 sums depend on their order."""

COMPARED = 64
"""Tokens whose logits are compared: the last of a text."""
_REACH = 4096
"""Maximum span of positions: of longer ones float32 angles are too inexact to compare, and attention in transformers needs T x T scores."""


@dataclasses.dataclass(frozen=True)
class Check:
  """The check at the end of a conversion."""

  kind: str = 'auto'
  """roundtrip: tensors that are read back have the same bits; transformers: also compare logits with transformers; auto: transformers
  where it is installed, else roundtrip; none"""
  tolerance: float = 1e-3
  """largest allowed difference of logits, or RELATIVE of the largest logit if that is more"""
  prompt: str = ''
  """text whose logits are compared; empty: random ids, more than the model's window"""

  def resolved(self) -> 'Check':
    """The check with auto resolved; announces the result on stderr. Raises a UserError for a check whose packages are not installed."""
    installed = all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))
    if self.kind == 'transformers' and not installed:
      raise UserError('--check', self.kind, 'roundtrip or none without torch and transformers (install requirements-parity.txt)')
    kind = ('transformers' if installed else 'roundtrip') if self.kind == 'auto' else self.kind
    announce(f'check: {kind}' + ('' if installed or kind == 'none' else
                                 '; torch and transformers are not installed: bits are compared, but not what the model computes'))
    return dataclasses.replace(self, kind=kind)

  def tokens(self, tokenizer: Tokenizer, model: AbstractModel, values: Json) -> Int[np.ndarray, '2 T']:
    """Ids of the prompt, at most as many as the model's context, and their positions; a UserError if the tokenizer cannot encode it.

    Without a prompt, the ids are more than the window of the model or of `values`, its config.json, and the positions are spread, so that a
    wrong window, kind of layer or scaling of the positions changes the logits.
    """
    if self.prompt:
      ids = tokenizer.encode(self.prompt, '--prompt')[:model.context]
      return np.stack([ids, np.arange(len(ids))]).astype(np.int32)
    stated = values.get('sliding_window') if values.get('use_sliding_window', True) else None
    window = max(model.config.window, stated if isinstance(stated, int) else 0)
    length = min(window + COMPARED, model.context, _REACH + COMPARED)
    if length <= min(window, model.context - 1):
      announce(f'check: {length:,} tokens are compared, too few to see the window of {window:,}')
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, length)
    return np.stack([ids, np.linspace(0, max(length, min(_REACH, model.context)) - 1, length)]).astype(np.int32)


def for_each_tensor(title: str, use: Callable[[Tensor, np.ndarray], None], checkpoints: Checkpoints, step: int, match: Match, mesh: Mesh,
                    entries: Mapping[str, Entry]) -> None:
  """Calls `use` with each tensor and its value in a checkpoint, in the dtype of its entry. Only some parameters at a time are restored,
  sharded over the mesh as at ZeRO stage 3."""
  shapes, shardings = match.model.shapes, match.model.shardings(3, mesh)
  with ProgressBar(title, sum(entries[tensor.name].bytes for tensor in match.tensors), 'bytes') as work:
    for names, tensors in match.groups():
      parameters = jax.block_until_ready(checkpoints.restore_parameters(step, {
        name: jax.ShapeDtypeStruct(shapes[name].shape, shapes[name].dtype, sharding=shardings[name]) for name in names}))
      for tensor in tensors:
        use(tensor, match.write(parameters, tensor, entries[tensor.name].dtype))
        work.advance(entries[tensor.name].bytes)


def compare_tensors(checkpoints: Checkpoints, step: int, match: Match, mesh: Mesh, entries: Mapping[str, Entry]) -> str:
  """Compares all tensors of a folder with a checkpoint's parameters, bit by bit; returns the result as text. Raises a UserError for a
  tensor that differs."""
  def compare(tensor: Tensor, ours: np.ndarray) -> None:
    theirs = entries[tensor.name].view()
    if tensor.parameters == ('positions/table',):
      ours, theirs = ours[:match.model.context], theirs[:match.model.context]
    if not np.array_equal(bits(ours), bits(theirs)):
      raise UserError('--check=roundtrip', tensor.name, 'the same bits in folder and checkpoint; nothing was written')

  for_each_tensor('compare', compare, checkpoints, step, match, mesh, entries)
  return f'roundtrip: all {len(match.tensors)} tensors have the same bits in folder and checkpoint'


def compare_logits(ours: Float[np.ndarray, 'T V'], theirs: Float[np.ndarray, 'T V'], tolerance: float) -> str:
  """Compares logits of the same text; returns the largest difference and the mean KL divergence from `theirs` (in nats) as text. Raises a
  UserError for a difference that is NaN or above both `tolerance` and RELATIVE of the largest logit."""
  largest, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
  p, q = (log_softmax(logits.astype(np.float64), -1) for logits in (theirs, ours))
  divergence = (np.exp(p) * (p - q)).sum(-1).mean()
  text = f'largest difference of logits {largest:.2e} of {scale:.1f}, mean KL {divergence:.2e} nats'
  allowed = max(tolerance, RELATIVE * scale)
  if not largest <= allowed:
    raise UserError('--check=transformers', text, f'a difference of at most {allowed:.1e}; nothing was written')
  return f'transformers: {text}; at most {allowed:.1e} is allowed'


def our_logits(model: AbstractModel, parameters: Parameters, mesh: Mesh, tokens: Int[np.ndarray, '2 T']) -> Float[np.ndarray, 'N V']:
  """Our logits of the last COMPARED ids of a text, given with their positions, in float32, without those of padded ids."""
  exact = abstract_model(model.config, ComputeConfig(scan=model.compute.scan), model.context, model.slots)

  def last(parameters: Parameters, ids: jax.Array, positions: jax.Array) -> jax.Array:
    transformer = exact.merge(parameters)
    return transformer.head.logits(transformer.hidden(ids, Positions(positions))[0][-COMPARED:])

  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):  # the default of accelerators rounds float32
    # Every group of devices computes the same row: attention kernels of accelerators need local rows.
    run = batch_shard_map(last, (PartitionSpec(),) * 3, PartitionSpec())
    return np.asarray(jax.jit(run)(parameters, tokens[:1], tokens[1:]))[:, :model.config.vocab_size]


def their_logits(folder: Path, tokens: Int[np.ndarray, '2 T']) -> Float[np.ndarray, 'N V']:
  """The same logits as transformers computes them from a folder, in a process of its own to bound this one's memory. Raises a UserError for
  a folder that transformers cannot load."""
  with tempfile.TemporaryDirectory() as scratch:
    out = f'{scratch}/logits.npy'
    np.save(f'{scratch}/tokens.npy', tokens)
    done = subprocess.run([sys.executable, '-m', 'gptjax.interop.reference', str(folder.absolute()), f'{scratch}/tokens.npy', out],
                          cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
      reason = (done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]
      raise UserError('--check=transformers', reason, 'a folder that transformers can load')
    return np.load(out)
