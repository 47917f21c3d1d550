"""A signal ends a program with one line and its status: while it works, imports or computes, and at random moments."""

import signal
import subprocess
import sys

import pytest
from commands import ROOT
from tiers import full

WORKS = '''
import sys, time
try:
  print('started', file=sys.stderr, flush=True)
  time.sleep(60)
finally:
  print('cleaned up', file=sys.stderr, flush=True)
'''
IMPORTS = '''
try:
  import slow
except BaseException:
  print('an import was interrupted', file=sys.stderr, flush=True)
'''
COMPUTES = '''
import hashlib, sys
from gptjax import signals
signals.watch()
print('started', file=sys.stderr, flush=True)
hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)  # minutes, without the interpreter
'''


@pytest.mark.parametrize('body, more', [(WORKS, ['cleaned up']), (IMPORTS, []), (COMPUTES, [])], ids=['works', 'imports', 'computes'])
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), full(signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_with_one_line(body, more, number, status, tmp_path):
  (tmp_path / 'recipe.py').write_text(body)
  (tmp_path / 'slow.py').write_text(WORKS)
  process = subprocess.Popen([sys.executable, '-m', 'gptjax.train', f'--config={tmp_path}/recipe.py'], stderr=subprocess.PIPE, text=True,
                             cwd=tmp_path, env={'PYTHONPATH': f'{ROOT}:{tmp_path}'})
  assert process.stderr.readline() == 'started\n'
  process.send_signal(number)
  printed = process.communicate(timeout=60)[1].splitlines()
  assert process.returncode == status and printed == [*more, f'{signal.Signals(number).name}: ended'], printed
