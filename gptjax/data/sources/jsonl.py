"""JSON lines: each line an object, one of whose fields, or several, are a document."""

import json
from collections.abc import Sequence

from gptjax.config import SourceConfig
from gptjax.data.sources.borders import Border
from gptjax.data.sources.fields import Fields, shortened
from gptjax.data.sources.files import File, fingerprint
from gptjax.data.sources.source import Malformed, Part, Record
from gptjax.data.sources.text import RecordFiles

_OBJECT = 'a JSON object on a line of its own'


def _no_number(name: str) -> None:
  raise ValueError(f'{name} is no JSON')


_DECODER = json.JSONDecoder(parse_constant=_no_number)


class JsonLines(RecordFiles):
  """Files of JSON objects, a line each. A record is a line; blank ones give nothing."""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self._fields = Fields(config.text)
    super().__init__(files, Border('\n'), self.part_bytes, description, config.skip)

  def fingerprint(self) -> str:
    return fingerprint('jsonl', self.files, self._fields.text)

  def place(self, part: Part, record: int) -> str:
    return f'{part.file}:{record + 1}'

  def record(self, part: Part, index: int, offset: int, piece: bytes) -> Record:
    try:
      line = piece.decode()
      if not line.strip():
        return None
      value = _DECODER.decode(line)
    except UnicodeDecodeError as error:
      return Malformed(piece[error.start:error.start + 4], 'UTF-8 text', index)
    except (ValueError, RecursionError):
      return Malformed(shortened(line), _OBJECT, index)
    if not isinstance(value, dict):
      return Malformed(shortened(line), _OBJECT, index)
    return self._fields.record(f'{part.name}#{offset}', value, index)
