"""Flags of the check at the end of a conversion."""

from typing import TYPE_CHECKING

from absl import flags

from gptjax.config import unescaped

if TYPE_CHECKING:  # JAX must be imported after flags are parsed
  from gptjax.interop import Check

_CHECK = flags.DEFINE_enum(
  'check', 'auto', ['auto', 'transformers', 'roundtrip', 'none'], 'roundtrip: tensors that are read back have the same bits; transformers: '
  'also compare logits with transformers; auto: transformers where it is installed, else roundtrip; nothing is written if the check fails')
_TOLERANCE = flags.DEFINE_float(
  'tolerance', 1e-3, 'largest allowed difference from the logits of transformers, in float32, or 1e-4 of the largest logit if that is more',
  lower_bound=0.0)
_PROMPT = flags.DEFINE_string(
  'prompt', '', r'text whose logits are compared, in which \n is a line end, \t a tab and \\ a backslash; empty: random ids, more than '
  'the window')


def check() -> 'Check':
  """The check that the flags describe."""
  from gptjax.interop import Check
  return Check(_CHECK.value, _TOLERANCE.value, unescaped(_PROMPT.value))
