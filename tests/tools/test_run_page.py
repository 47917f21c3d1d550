"""A page is run as it is written, and its shown prints and pictures can be renewed."""

import json

from commands import run_module

PAGE = '''# A page

```python
value = 1
# not a heading
```

## Second

```python
value += 1
print(value)
```

```text
3
```

```python
from pathlib import Path
Path('drawn.png').write_bytes(b'picture')
print('new')
```
'''


def test_a_page_is_run_and_its_prints_are_renewed(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text(PAGE)
  done = run_module('tools.run_page', f'--page={page}', f'--json={tmp_path / "found.json"}', '--write')
  assert done.returncode == 0, done.stderr
  assert done.stdout == "# line 4, 'A page'\n# line 11, 'Second'\n2\n# line 20, 'Second'\nnew\n"
  assert json.loads((tmp_path / 'found.json').read_text()) == {'printed': ['', '2\n', 'new\n'], 'failure': ''}
  assert page.read_text() == PAGE.replace('text\n3', 'text\n2') + '```text\nnew\n```\n'
  assert [path.name for path in (tmp_path / 'pictures').iterdir()] == ['drawn.png']


def test_an_error_names_its_place_and_changes_nothing(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text(PAGE.replace('print(value)', 'print(value / 0)'))
  before = page.read_text()
  done = run_module('tools.run_page', f'--page={page}', '--write')
  assert done.returncode == 1 and "line 11, 'Second': Traceback" in done.stdout and f'{page}", line 12' in done.stdout
  assert page.read_text() == before and not (tmp_path / 'pictures').exists()
  missing = run_module('tools.run_page', f'--page={tmp_path / "none.md"}')
  assert missing.returncode == 2 and missing.stderr.startswith('error: --page')
