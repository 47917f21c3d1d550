"""Third-party packages: those that only some sources and tokenizers need, and their errors."""

import importlib
from types import ModuleType

from gptjax.config import UserError


def optional(package: str, field: str, value: str) -> ModuleType:
  """Imports a package, named alike for import and pip, that a config field's value needs.

  Raises a UserError if the package is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError:
    raise UserError(field, value, f'a machine with the {package} package: pip install {package}') from None


def library_error(field: str, value: str, expected: str, error: Exception) -> UserError:
  """The error for an exception of a library, with the first line of its message."""
  reason = next(iter(str(error).strip().splitlines()), '')
  return UserError(field, value, f'{expected} ({type(error).__name__}: {reason})')
