"""Packages that only some sources need."""

import importlib
from types import ModuleType

from gptjax.config import UserError


def optional(package: str, asked: str) -> ModuleType:
  """Imports a package that a source needs.

  Args:
    package: its name, the same for import and pip.
    asked: the path or URL that needs it.

  Raises:
    UserError: it is not installed.
  """
  try:
    return importlib.import_module(package)
  except ImportError:
    raise UserError('data.source.path', asked, f'a machine with the {package} package: pip install {package}') from None
