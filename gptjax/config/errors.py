"""The exceptions that end a binary with one line."""

import difflib
import sys
from collections.abc import Iterable, Mapping

_MAX_CHARACTERS = 200
"""Of a value in an error."""


def _shown(value: object) -> str:
  try:
    text = repr(value)
  except ValueError:  # Python does not print longer integers
    text = f'an integer of more than {sys.get_int_max_str_digits()} digits'
  return text if len(text) <= _MAX_CHARACTERS else f'{text[:_MAX_CHARACTERS]}... ({len(text):,} characters)'


class Fault(Exception):
  """A failure of the machine rather than a mistake of its user; binaries print it as one `error:` line and exit with 1."""


class UserError(ValueError):
  """A mistake in a config, a flag or an input file; binaries print it as one `error:` line and exit with 2.

  Args:
    field: a config field ('model.heads'), a flag ('--workdir') or a file, optionally with a line.
    value: the wrong value; strings are quoted.
    expected: description of valid values.
    names: candidates for the nearest match, if the mistake may be a misspelling; a mapping gives the text to suggest for each.
    given: text to compare with the names, if it is not the value.
  """

  def __init__(self, field: str, value: object, expected: str, names: Iterable[str] | Mapping[str, str] = (), given: str = ''):
    text = f'{field if len(field) <= _MAX_CHARACTERS else f"{field[:_MAX_CHARACTERS]}..."}: {_shown(value)}, expected: {expected}'
    given = given or (value if isinstance(value, str) else _shown(value))
    nearest = difflib.get_close_matches(given, list(names), n=1, cutoff=0.5)
    if nearest:
      text += f'; did you mean {names[nearest[0]] if isinstance(names, Mapping) else nearest[0]}?'
    super().__init__(' '.join(text.split()))

  def __reduce__(self):
    return UserError.from_text, (str(self),)  # so that it can cross a process boundary

  @classmethod
  def from_text(cls, text: str) -> 'UserError':
    """Recreates an error of another process from its text."""
    error = cls.__new__(cls)
    error.args = (text,)
    return error
