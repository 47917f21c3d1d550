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


WRITES = {'gptjax.train': 'workdir', 'tools.import_hf': 'workdir', 'tools.export_hf': 'folder', 'tools.export_peft': 'folder',
          'tools.import_peft': 'workdir'}
"""The flag that names what a module writes; OUTPUTS do so for all."""
OUTPUTS = ('out', 'plot', 'samples', 'picture', 'json')


PATHS = re.compile(r'(?<![\w:/])(?:[A-Z]+(?:\.md)?|(?:configs|docs|examples|tools|stores|tokenizers|runs|exports)/[\w./]+)(?![\w/])')


def resolve(commands):
  """Parses commands as they are written and resolves their configs, without doing what they ask for.

  Every file and folder that they name is in this repository, or an earlier command writes it.
  """
  written = ()
  for command in commands:
    for part in command.split(' -- '):  # a launcher, and the command that it starts
      _, _, module, *arguments = shlex.split(part)
      arguments = ['--config=configs/default.py' if one.startswith(tuple(f'--config={path}' for path in written)) else one
                   for one in arguments]  # the config.json of a run that is not there
      done = run_module(module, *arguments, only_parse=True)
      assert done.returncode == 0, f'{command}\n{done.stderr}'
      flags = dict(argument.lstrip('-').partition('=')[::2] for argument in arguments)
      new = tuple(flags.pop(name) for name in (*OUTPUTS, WRITES.get(module)) if name in flags)
      for value in flags.values():
        for path in PATHS.findall(value):
          assert (ROOT / path).exists() or path.startswith(written), f'{command}\n{path}: no such file, and no command writes it'
      written += new


def run(commands, folder):
  """Runs commands as they are written, in a folder that looks like this repository; returns what each one printed."""
  for name in ('gptjax', 'tools', 'configs', 'examples', 'experiments', 'LICENSE', 'README.md'):
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
