"""Flags of the check at the end of a conversion."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:  # brings JAX, which waits until flags are read
  from gptjax.interop import Check

_CHECK = flags.DEFINE_enum(
  'check', 'auto', ['auto', 'transformers', 'roundtrip', 'none'], 'roundtrip: tensors read back are bitwise equal; transformers: also '
  'compare logits with transformers; auto: transformers if it is installed, else roundtrip; a failed check leaves no output')
_TOLERANCE = flags.DEFINE_float(
  'tolerance', 1e-3, 'maximum difference from the logits of transformers, in float32, or 1e-4 of the largest logit if that is more',
  lower_bound=0.0)
_PROMPT = flags.DEFINE_string('prompt', '', 'text whose logits are compared; empty: 64 random ids, always the same')


def check() -> 'Check':
  """The check that the flags describe."""
  from gptjax.interop import Check
  return Check(_CHECK.value, _TOLERANCE.value, _PROMPT.value)
