"""Flags of the check that a conversion ends with."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:  # brings JAX, which waits until flags are read
  from gptjax.interop import Check

_CHECK = flags.DEFINE_enum(
  'check', 'auto', ['auto', 'transformers', 'roundtrip', 'none'], 'roundtrip: tensors read back are the same bits; transformers: that, '
  'and logits against transformers; auto: transformers where it is installed, else roundtrip; a check that fails leaves nothing')
_TOLERANCE = flags.DEFINE_float(
  'tolerance', 1e-3, 'largest difference of logits from those of transformers, in float32; 1e-4 of the largest logit where that is more',
  lower_bound=0.0)
_PROMPT = flags.DEFINE_string('prompt', '', 'text whose logits are compared; empty: 64 ids drawn at random, always the same')


def check() -> 'Check':
  """The check that the command line asks for."""
  from gptjax.interop import Check
  return Check(_CHECK.value, _TOLERANCE.value, _PROMPT.value)
