"""Packages that only some sources and tokenizers need."""

import importlib
from types import ModuleType

from gptjax.config import UserError


def optional(package: str, field: str, value: str) -> ModuleType:
  """Imports a package, named alike for import and pip, that a config field's value needs.

  Raises:
    UserError: the package is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError:
    raise UserError(field, value, f'a machine with the {package} package: pip install {package}') from None
