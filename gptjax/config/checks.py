"""The exceptions that end a program with one line, and the valid values of a config's field, as a part of its type."""

import contextlib
import difflib
import errno
import importlib
import math
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

INT32_MAX = 2**31 - 1
"""Devices count steps, ids and positions in int32."""
_MAX_CHARACTERS = 200
"""Maximum length of a value in an error."""


def _shown(value: object) -> str:
  try:
    text = repr(value)
  except ValueError:  # Python does not print longer integers
    text = f'an integer of more than {sys.get_int_max_str_digits()} digits'
  return text if len(text) <= _MAX_CHARACTERS else f'{text[:_MAX_CHARACTERS]}... ({len(text):,} characters)'


class Fault(Exception):
  """A failure of the machine rather than a mistake of its user; programs print it as one `error:` line and exit with 1."""


class UserError(ValueError):
  """A condition that the user can correct: a mistake in a config, flag or input file, a full disk, a damaged checkpoint, or a loss that is
  not finite. Programs print it as one `error:` line and exit with 2.

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
    nearest = difflib.get_close_matches(given, list(names), n=1)
    if nearest:
      text += f'; did you mean {names[nearest[0]] if isinstance(names, Mapping) else nearest[0]}?'
    super().__init__(' '.join(text.split()))

  def __reduce__(self):
    return UserError.from_text, (str(self),)  # so that it can cross a process boundary

  @classmethod
  def from_text(cls, text: str) -> 'UserError':
    """Recreates an error of another process from its text."""
    return cls.__new__(cls, text)


_ALLOWED, _SPACE = 'a path that this user may read and write', 'a disk with space left'
_MISTAKES = {
  errno.ENOENT: 'an existing file or folder', errno.EEXIST: 'a path that does not exist yet', errno.ENOTEMPTY: 'an empty folder',
  errno.EISDIR: 'a file, not a folder', errno.ENOTDIR: 'a folder, not a file', errno.EACCES: _ALLOWED, errno.EPERM: _ALLOWED,
  errno.EROFS: _ALLOWED, errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: 'a file system that stores files of this size',
  errno.ENAMETOOLONG: 'a shorter path', errno.ELOOP: 'a link that does not lead to itself', errno.ENXIO: 'a file',
  errno.EIO: 'a disk that works', errno.ESTALE: 'a network disk that works', errno.EMFILE: 'a higher limit of open files: ulimit -n',
  errno.ENFILE: 'a higher limit of open files'}
"""The expected value in the message for each system error whose cause is a path or the machine; other errors are bugs."""


def os_mistake(error: OSError) -> UserError | None:
  """Returns the error to show for one of the system whose cause is a path or the machine; None for any other, which is a bug.

  It names the `operation` and its path, or else the function of gptjax that failed and the path that the error names.
  """
  if error.errno not in _MISTAKES:
    return None
  calls = [frame.f_globals['__name__'] + '.' + frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
  call = next((call for call in reversed(calls) if call.startswith(('gptjax.', 'tools.', '__main__.'))), 'system')
  path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ''
  name = getattr(error, '__notes__', [f'{call} {path}'.rstrip()])[0]  # of several, the innermost
  about = name.partition(' ')[2]
  if path not in about and about not in path:  # a file that the operation read, for example
    name = f'{name}: {call} {path}'
  return UserError(name, error.strerror, _MISTAKES[error.errno])


@contextlib.contextmanager
def operation(name: str, path: object) -> Iterator[None]:
  """Adds to an OSError what was done, 'write' for example, and to which path; of errors in writing, the system itself names no path."""
  try:
    yield
  except OSError as error:
    error.add_note(f'{name} {path}')
    raise


class Limit(NamedTuple):
  """A condition on a field's value, in its type: Annotated[int, Limit(...)]."""

  holds: Callable[[Any], bool]
  expected: str


def at_least(lowest: float) -> Limit:
  """The limit of values from `lowest` on."""
  return Limit(lambda value: value >= lowest, f'{lowest} or more')


def at_most(highest: float) -> Limit:
  """The limit of values up to `highest`."""
  return Limit(lambda value: value <= highest, f'{highest} or less')


Positive = Annotated[int, at_least(1), at_most(INT32_MAX)]
NonNegative = Annotated[int, at_least(0), at_most(INT32_MAX)]
PositiveFloat = Annotated[float, Limit(lambda value: value > 0, 'a number above 0')]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, Limit(lambda value: 0 <= value <= 1, '0 to 1')]
FractionBelow1 = Annotated[float, Limit(lambda value: 0 <= value < 1, 'at least 0 and below 1')]


class Group:
  """A group of fields of a config; a value outside the limits of its field's type raises a UserError that names it with a prefix."""

  _prefix, _limits = '', list[tuple[str, Limit]]()  # without annotations, which would make them fields

  def __init_subclass__(cls, prefix: str = '') -> None:
    hints = typing.get_type_hints(cls, include_extras=True)
    cls._prefix, cls._limits = prefix, [(name, limit) for name, hint in hints.items() for limit in getattr(hint, '__metadata__', ())]

  def __post_init__(self) -> None:
    for name, limit in self._limits:
      if not limit.holds(value := getattr(self, name)):
        raise UserError(f'{self._prefix}{name}', value, limit.expected)


def entry(table: Mapping[str, Any], field: str, name: str) -> Any:
  """The entry of a table that a field names, or with MODULE:NAME your own, which is imported. Raises a UserError if there is none."""
  if name in table:
    return table[name]
  why, (module, _, own) = 'no such entry', name.partition(':')
  if module and own:
    try:
      return getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
      why = str(error)
  expected = f'{", ".join(table)}, or MODULE:NAME of a module in the current folder or on PYTHONPATH ({why})'
  raise UserError(field, name, expected, () if own else list(table))


def divisors(n: int) -> str:
  """Returns the divisors of n in ascending order, for an error."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return ', '.join(map(str, [*small, *(n // d for d in reversed(small) if d * d < n)]))
