"""Every chapter of the guide runs, prints what it shows, and has the form that its index promises."""

import re

import pytest
from chapters import COMPARISON, COUNT, GUIDE, built_lines, chapters, difference, form_mistakes, run_mistakes


@pytest.mark.parametrize('name', chapters())
def test_a_chapter_is_complete(name):
  mistakes = [*form_mistakes(GUIDE / name)]
  assert not mistakes, '\n'.join(mistakes)


@pytest.mark.full
@pytest.mark.parametrize('name', chapters())
def test_a_chapter_prints_what_it_shows(name, tmp_path):
  mistakes = [*run_mistakes(GUIDE / name, tmp_path)]
  assert not mistakes, '\n'.join(mistakes)


def test_the_index_names_every_chapter():
  rows = re.findall(r'^\| \[(\d+) [^\]]+\]\((\S+)\) \|', (GUIDE / 'README.md').read_text(), re.MULTILINE)
  assert [int(number) for number, _ in rows] == [*range(1, COUNT + 1)]
  names = [name for _, name in rows]
  assert set(chapters()) <= set(names) and all(name.startswith(f'{int(number):02}_') for number, name in rows)


@pytest.mark.parametrize('shown, printed, is_same', [
    ('loss 4.16', 'loss 4.20\n', True), ('loss 4.16', 'loss 4.30', False), ('loss 4.16', 'Loss 4.16', False),
    ('a  1', 'a 1', True), ('0.0', '5e-7', True), ('0.0', '1e-3', False), ('124,439,808', '124,439,809', True),
    ('[1 2 3]', '[1 2]', False), ('a\nb', 'a', False), ('', 'a', False), ('-1.5', '1.5', False), ('True', 'True', True)])
def test_words_are_compared_exactly_and_numbers_to_2_percent(shown, printed, is_same):
  found = difference(shown, printed)
  assert (found == '') == is_same and (is_same or (repr((shown.splitlines() or [None])[-1]) in found))


WRONG = '''# Sums

```python
total = 1 + 1
print('total', total)
```

```text
total 3
```

## More

```python
import matplotlib
raise ValueError('never')
```
'''


def test_a_mistake_is_named_with_its_block(tmp_path):
  page = tmp_path / '03_sums.md'
  page.write_text(WRONG)
  folder = tmp_path / 'empty'
  folder.mkdir()
  wrong, raised = run_mistakes(page, folder)
  assert wrong == "03_sums.md, line 4, 'Sums': the page shows 'total 3', the block prints 'total 2'"
  assert raised.startswith("03_sums.md, line 15, 'More': ") and f'{page}", line 16' in raised and raised.endswith('ValueError: never\n')
  found = '\n'.join(form_mistakes(page))
  for words in (COMPARISON, '1e-5', '0 exercises', 'pictures/03_sums.png', '03_sums.png is not in'):
    assert words in found, found
  page.write_text(WRONG.replace('```text', '\nIt prints:\n\n```text') + '```python\n')
  found = '\n'.join(form_mistakes(page))
  assert "line 12, 'Sums': not a python block, nor a text block right after one" in found and 'the fence does not end' in found


def test_lines_that_build_are_counted():
  assert built_lines(WRONG) == 1
  plain = WRONG.replace('import matplotlib', 'import math')  # no picture
  assert built_lines(plain) == 2
  assert built_lines(plain.replace('## More', f'## {COMPARISON}')) == 1
  longer = 'def three():\n  # a comment\n\n  print(3)\n  return 3\nfor one in range(3):\n  print(one)\ntotal ='
  assert built_lines(WRONG.replace('total =', longer)) == 4
