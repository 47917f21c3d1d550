"""Packages that only some sources and tokenizers need."""

import importlib
from types import ModuleType

from gptjax.config import UserError


def optional(package: str, field: str, value: str) -> ModuleType:
  """Imports a package whose name is the same for import and pip.

  Args:
    package: its name.
    field: the config field that asks for it.
    value: the field's value.

  Raises:
    UserError: the package is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError:
    raise UserError(field, value, f'a machine with the {package} package: pip install {package}') from None
