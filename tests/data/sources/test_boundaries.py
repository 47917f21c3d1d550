"""The next record found from any offset is one that is found from the start, for all small texts."""

import itertools

import pytest

from gptjax.data.sources.text import Boundary


@pytest.mark.parametrize('separator', ['a', 'aa', 'ab', 'aba', 'aab', 'aaa', 'abab'])
@pytest.mark.parametrize('window', [1, 2**16])
def test_records_begin_where_splitting_the_complete_text_begins_them(separator, window, monkeypatch):
  monkeypatch.setattr('gptjax.data.sources.text._WINDOW', window)
  boundary = Boundary(separator)
  for text in map(''.join, itertools.product('ab', repeat=9)):
    pieces = text.split(separator)
    begins = [0, *itertools.accumulate(len(piece) + len(separator) for piece in pieces[:-1])]
    data = text.encode()
    for at in range(len(data) + 1):
      found = boundary.after(lambda start, stop: data[start:stop], at)
      assert found == min((begin for begin in begins if begin >= at), default=len(data))
    assert [piece.decode() for _, piece in boundary.split(data, 0)] == (pieces if pieces[-1] else pieces[:-1])
