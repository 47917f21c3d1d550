"""Damaged copies of data in a workdir."""

import json

import pytest

from gptjax.config import UserError
from gptjax.data import open_held_out

GOOD = {'fingerprint': 'abc', 'valid': ['books'], 'tags': {}}


@pytest.mark.parametrize('found', [
  None, [], {}, GOOD | {'valid': 'books'}, GOOD | {'valid': [1]}, GOOD | {'tags': []}, GOOD | {'tags': {'prose': ['poems']}},
  GOOD | {'tags': {'prose': []}},
  GOOD | {'tags': {'prose': 3}}, GOOD | {'fingerprint': None}])
def test_a_damaged_identity_is_one_error(tmp_path, found):
  (tmp_path / 'identity.json').write_text(json.dumps(found))
  with pytest.raises(UserError, match='identity.json: .*(as they were written; restore it|a JSON object)'):
    open_held_out(tmp_path)


@pytest.mark.parametrize('data', [b'', b'\xff', b'[' * 100_000, b'9' * 5000])
def test_an_identity_that_is_not_json_is_one_error(tmp_path, data):
  (tmp_path / 'identity.json').write_bytes(data)
  with pytest.raises(UserError, match='identity.json: .*JSON'):
    open_held_out(tmp_path)
