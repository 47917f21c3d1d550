"""Files that are whole or not there, and JSON that every reader understands."""

import json
import math
from pathlib import Path
from typing import Any

from gptjax.config import UserError


def write_whole(path: Path, text: str) -> None:
  """Writes a file beside its place and then moves it there: who reads it never sees a part."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(text)
  partial.rename(path)


def json_line(record: dict[str, Any]) -> str:
  """One line of JSON; numbers that are not finite, which JSON does not have, become null."""
  finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
  return json.dumps({name: finite(value) for name, value in record.items()})


def read_json(path: Path) -> Any:
  """The JSON of a file.

  Raises:
    UserError: there is no such file, or something else is in it.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(str(path), None, 'a JSON file; there is none') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(str(path), str(error), 'a whole JSON file') from None
