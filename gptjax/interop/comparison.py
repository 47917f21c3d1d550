"""Whether a run and a folder are the same model: by their tensors, and by what transformers computes."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from gptjax.checkpoint import Checkpoints
from gptjax.config import ComputeConfig, UserError
from gptjax.data import Tokenizer
from gptjax.data.progress import Work, announce
from gptjax.interop.matching import Match, raw
from gptjax.interop.tensor_files import Entry
from gptjax.model import AbstractModel, Parameters, abstract_model

CHECKS = ('auto', 'transformers', 'roundtrip', 'none')

RELATIVE = 1e-4
"""Of the largest logit: what a difference may always be, since float32 adds up in another order."""


@dataclasses.dataclass(frozen=True)
class Check:
  """What a conversion ends with."""

  kind: str = 'auto'
  """transformers: roundtrip, and logits against transformers; roundtrip: tensors read back are the same bits; none; auto: the first
  that can be done on this machine"""
  tolerance: float = 1e-3
  """largest difference of logits; RELATIVE of the largest logit where that is more"""
  prompt: str = ''
  """text whose logits are compared; empty: 64 ids drawn at random, always the same"""

  def chosen(self) -> 'Check':
    """The check with auto resolved; which it is, is told on stderr.

    Raises:
      UserError: what it needs is not installed.
    """
    there = all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))
    if self.kind == 'transformers' and not there:
      raise UserError('--check', self.kind, 'roundtrip or none without torch and transformers (requirements-parity.txt brings them)')
    kind = ('transformers' if there else 'roundtrip') if self.kind == 'auto' else self.kind
    announce(f'check: {kind}' + ('' if there or kind == 'none' else '; torch and transformers are not installed'))
    return dataclasses.replace(self, kind=kind)

  def tokens(self, tokenizer: Tokenizer, plan: AbstractModel) -> Int[np.ndarray, 'T']:
    """Ids of the prompt.

    Raises:
      UserError: the tokenizer cannot encode it.
    """
    if not self.prompt:
      return np.random.default_rng(0).integers(0, plan.config.vocab_size, min(64, plan.context), np.int32)
    return tokenizer.encode(self.prompt, '--prompt')[:plan.context]


def restored(checkpoints: Checkpoints, step: int, plan: AbstractModel, mesh: Mesh, names: list[str]) -> Parameters:
  """Some parameters of a checkpoint, with whatever axes can be shared out over the mesh."""
  shardings = plan.shardings(3, mesh)
  return checkpoints.restore_parameters(step, {
    name: jax.ShapeDtypeStruct(plan.shapes[name].shape, plan.shapes[name].dtype, sharding=shardings[name]) for name in names})


def compare_tensors(checkpoints: Checkpoints, step: int, match: Match, mesh: Mesh, entries: Mapping[str, Entry]) -> str:
  """Holds every tensor of a folder against the checkpoint's parameters, bit by bit; returns what was found, in words.

  Raises:
    UserError: one differs.
  """
  with Work('compare', sum(entries[tensor.name].bytes for tensor in match.tensors), 'bytes') as work:
    for names, tensors in match.groups():
      parameters = restored(checkpoints, step, match.plan, mesh, names)
      for tensor in tensors:
        entry = entries[tensor.name]
        ours = match.write(parameters, tensor, entry.dtype)
        theirs = entry.view()
        if tensor.parameters == ('positions/table',):
          ours, theirs = ours[:match.plan.context], theirs[:match.plan.context]
        if not np.array_equal(raw(ours), raw(theirs)):
          raise UserError('--check=roundtrip', tensor.name, 'the same bits in folder and checkpoint; nothing is kept')
        work.advance(entry.bytes)
  return f'roundtrip: all {len(match.tensors)} tensors are the same bits in folder and checkpoint'


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two models' logits are apart."""

  largest: float
  """difference of two logits"""
  divergence: float
  """mean KL divergence of our next-token distributions from theirs, in nats"""
  scale: float
  """the largest logit of theirs"""

  @classmethod
  def of(cls, ours: Float[np.ndarray, 'T V'], theirs: Float[np.ndarray, 'T V']) -> 'Agreement':
    """Compares logits of the same text."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (theirs, ours))
    return cls(float(np.abs(ours - theirs).max()), float((np.exp(p) * (p - q)).sum(-1).mean()), float(np.abs(theirs).max()))

  def report(self, tolerance: float) -> str:
    """The figures in words.

    Raises:
      UserError: they differ by more than the tolerance.
    """
    allowed = max(tolerance, RELATIVE * self.scale)
    words = f'largest difference of logits {self.largest:.2e} of {self.scale:.1f}, mean KL {self.divergence:.2e} nats'
    if not self.largest <= allowed:  # nor what is not a number
      raise UserError('--check=transformers', words, f'a difference of at most {allowed:.1e}; nothing is kept')
    return f'transformers: {words}; at most {allowed:.1e} is allowed'


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def our_logits(plan: AbstractModel, parameters: Parameters, mesh: Mesh, tokens: Int[np.ndarray, 'T']) -> Float[np.ndarray, 'T V']:
  """Logits of a text in float32, without padded ids."""
  exact = abstract_model(plan.config, ComputeConfig(scan=plan.compute.scan), plan.context)
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):  # accelerators round float32 otherwise
    logits = jax.jit(lambda parameters, tokens: exact.merge(parameters)(tokens))(parameters, tokens[None])
    return np.asarray(logits)[0, :, :plan.config.vocab_size]


def their_logits(folder: Path, tokens: Int[np.ndarray, 'T']) -> Float[np.ndarray, 'T V']:
  """Logits that transformers computes from a folder in float32, in a process whose memory goes with it.

  Raises:
    UserError: transformers fails on the folder.
  """
  with tempfile.TemporaryDirectory() as scratch:
    out = Path(scratch, 'logits.npy')
    done = subprocess.run([sys.executable, '-m', 'gptjax.interop.reference', str(folder.absolute()), json.dumps(tokens.tolist()), str(out)],
                          cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
      reason = (done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]
      raise UserError('--check=transformers', reason, 'a folder that transformers opens')
    return np.load(out)
