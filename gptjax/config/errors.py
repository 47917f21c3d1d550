"""The one exception for what a user got wrong."""

import difflib
import sys
from collections.abc import Iterable, Mapping


_SHOWN = 200
"""Most characters of a value in an error."""


def _shown(value: object) -> str:
  try:
    text = repr(value)
  except ValueError:  # Python writes no longer integers
    text = f'an integer of more than {sys.get_int_max_str_digits()} digits'
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}... ({len(text):,} characters)'


class Fault(Exception):
  """What went wrong with a machine, and no mistake of its user; binaries print it as one `error:` line and exit with 1."""


class UserError(ValueError):
  """A mistake in a config, a flag or an input file; binaries print it as one `error:` line and exit with 2.

  Args:
    field: what was wrong: a config field ('model.heads'), a flag ('--workdir') or a file with its place.
    value: what was given; strings are quoted.
    expected: what was expected.
    names: names to look for the nearest match in, where the mistake may be a misspelling; a mapping gives the text that
      is suggested for each.
    given: what to compare with the names, where it is not the value.
  """

  def __init__(
      self, field: str, value: object, expected: str, names: Iterable[str] | Mapping[str, str] = (), given: str = ''):
    text = f'{field if len(field) <= _SHOWN else f"{field[:_SHOWN]}..."}: {_shown(value)}, expected: {expected}'
    given = given or (value if isinstance(value, str) else _shown(value))
    nearest = difflib.get_close_matches(given, list(names), n=1, cutoff=0.5)
    if nearest:
      text += f'; did you mean {names[nearest[0]] if isinstance(names, Mapping) else nearest[0]}?'
    super().__init__(' '.join(text.split()))

  def __reduce__(self):
    return UserError.from_text, (str(self),)  # so that a worker process can raise it

  @classmethod
  def from_text(cls, text: str) -> 'UserError':
    """The error that another process raised, from its text."""
    error = cls.__new__(cls)
    error.args = (text,)
    return error
