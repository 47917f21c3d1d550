"""The commands of README and guides, and how tests run them."""

import os
import re
import shlex
import sys
from pathlib import Path

from commands import ROOT, run_module


def commands_of(page, language='sh'):
  blocks = re.findall(rf'^```{language}\n(.*?)^```', (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
  return [line for block in blocks for line in block.splitlines()]


def run(commands, folder):
  """Runs commands as they are written, in a folder that looks like this repository; returns what each one printed."""
  for name in ('gptjax', 'tools', 'configs', 'LICENSE', 'README.md'):
    (folder / name).symlink_to(ROOT / name)
  # The caches of a home folder that tests may fill; compiled programs are shared with the other tests of this machine.
  environment = {**os.environ, 'HOME': str(ROOT / '.jax_cache' / 'home'),
                 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}  # the python of commands within commands
  printed = {}
  for command in commands:
    program, flag, module, *arguments = shlex.split(command)
    assert (program, flag) == ('python', '-m'), command
    done = run_module(module, *arguments, folder=folder, environment=environment)
    assert done.returncode == 0, f'{command}\n{done.stderr}'
    printed[command] = done.stdout
  return printed
