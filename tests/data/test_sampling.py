"""A sample has about the requested size, is reproducible, and reads few parts of a large source."""

import pytest
from memory import Memory, documents, malformed

from gptjax.config import UserError
from gptjax.data.sources import is_held_out, sample
from gptjax.data.sources.source import Document


def characters(found):
  return sum(len(document.text) for document in found)


@pytest.mark.parametrize('budget', [100_000, 100_001, 10**9])
def test_a_source_within_the_budget_is_sampled_completely(budget):
  assert list(sample(Memory(documents(1000)), budget)) == documents(1000)


@pytest.mark.parametrize('budget', [1_000, 10_000, 50_000])
@pytest.mark.parametrize('bytes_each', [10, 2, 30])  # as it is, compressed to a fifth, or a third of it text
def test_a_sample_of_a_larger_source_has_about_the_requested_size(budget, bytes_each):
  source = Memory(documents(10_000, 10), bytes_each=bytes_each)
  found = list(sample(source, budget))
  assert 0.8 * budget < characters(found) < 1.25 * budget
  assert found == sorted(found, key=lambda document: document.name)
  assert found == list(sample(source, budget))
  assert len({document.text[0] for document in found}) > 20


def test_only_some_parts_of_a_large_source_are_read():
  source = Memory(documents(10_000))
  list(sample(source, 10_000))  # a hundredth
  assert 35 <= len(source.read_parts) <= 45  # of 1,000
  assert max(b - a for a, b in zip(source.read_parts, source.read_parts[1:])) < 100


def test_even_the_smallest_sample_reads_a_part():
  source = Memory(documents(10_000))
  list(sample(source, 1))
  assert len(source.read_parts) == 1


@pytest.mark.parametrize('pieces', [1, 100])
def test_one_huge_text_is_sampled_in_one_piece_or_in_many(pieces):
  text = ''.join(chr(ord('a') + i % 26) * 1000 for i in range(10_000))
  step = len(text) // pieces
  source = Memory([Document('huge', text[i:i + step]) for i in range(0, len(text), step)], per_part=4)
  found = list(sample(source, 2_000_000))
  assert 1_400_000 < characters(found) < 2_600_000
  assert all(document.name == 'huge' and document.text in text for document in found)


def test_malformed_records_are_skipped_up_to_a_fraction():
  records = [*documents(98), malformed(0), malformed(1)]
  assert len(list(sample(Memory(records, per_part=100, skip=0.02), 10**6))) == 98
  with pytest.raises(UserError, match=r"^memory, record 1 from 0 on: '{', expected: JSON$"):
    list(sample(Memory(records, per_part=100, skip=0.01), 10**6))
  with pytest.raises(UserError):
    list(sample(Memory([malformed(0)]), 10**6))


def test_a_larger_fraction_keeps_held_out_documents_held_out():
  names = [f'{i}' for i in range(10_000)]
  small, large = ({name for name in names if is_held_out(name, share)} for share in (0.01, 0.1))
  assert 70 < len(small) < 130
  assert 900 < len(large) < 1100
  assert small < large
  assert not any(is_held_out(name, 0.0) for name in names)
  assert is_held_out('\udcff', 1.0)


def test_the_sample_has_the_held_out_fraction_of_the_source():
  found = list(sample(Memory(documents(20_000, 10)), 50_000))
  assert 0.07 < sum(is_held_out(document.name, 0.1) for document in found) / len(found) < 0.13
