"""The heap keeps the memory that a step frees; systems without glibc, and runs on accelerators, are not changed."""

import ctypes
import fnmatch
import os
import platform
import statistics
import subprocess
import sys

import pytest

from gptjax import heap

LOOP = """
import resource
from gptjax import heap
if {refused}: heap._available_memory = lambda: 1 << 60
assert heap.keep_freed_memory()
import jax
import jax.numpy as jnp
product = jax.jit(lambda x: jnp.outer(x, x) @ x)  # a temporary of 64 MiB: 16,384 pages
for _ in range(24):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  product(jnp.ones(4096)).block_until_ready()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
@pytest.mark.parametrize('refused', [False, True], ids=['huge pages', 'no memory to reserve'])
def test_temporaries_of_a_jitted_function_stay_in_the_process(refused):
  done = subprocess.run([sys.executable, '-c', LOOP.format(refused=refused)], capture_output=True, text=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.getcwd()})
  assert done.returncode == 0, done.stderr
  assert statistics.median(map(int, done.stdout.split()[12:])) < 500, done.stdout


@pytest.mark.parametrize('library', ['', 'libc'], ids=['macOS', 'musl'])
def test_another_c_library_is_not_changed(library, monkeypatch):
  monkeypatch.delitem(sys.modules, 'jax', raising=False)
  monkeypatch.setattr(platform, 'libc_ver', lambda: (library, ''))
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: pytest.fail('no function of the C library may be called'))
  assert not heap.keep_freed_memory()


def test_a_process_that_has_imported_jax_is_not_changed(monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax', object())
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: pytest.fail('no function of the C library may be called'))
  assert not heap.keep_freed_memory()


@pytest.mark.parametrize('platforms, device, expected', [
  ('cpu', '/dev/nvidia0', True), ('cpu,cuda', '', True), ('cuda,cpu', '', False), ('tpu', '', False),
  ('', '/dev/nvidia0', False), ('', '/dev/accel0', False), ('', '/dev/vfio/7', False), ('', '/dev/null', True)])
def test_the_platform_comes_from_jax_platforms_or_the_machine(platforms, device, expected, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(heap, 'glob', lambda pattern: fnmatch.filter([device], pattern))
  assert heap.runs_on_cpu() == expected


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
  limit = tmp_path / 'memory.max'
  monkeypatch.setattr(heap, '_CONTAINER_LIMITS', (str(tmp_path / 'none'), str(limit)))
  limit.write_text('max\n')
  machine = heap._available_memory()
  limit.write_text('1048576\n')
  assert heap._available_memory() == 1048576 < machine


PROGRAM = """
import runpy, sys
from gptjax import heap
heap.keep_freed_memory = lambda: sys.exit('memory is kept')
sys.argv = ['-m', '--workdir=/none/run', *{flags}]
runpy.run_module('{program}', run_name='__main__', alter_sys=True)
"""


@pytest.mark.parametrize('program, flags, expected', [
  ('gptjax.evaluate', [], 'memory is kept'), ('tools.import_hf', ['--folder=/none'], "error: --folder: '/none'"),
  pytest.param('tools.export_hf', ['--out=/none/out'], 'error: ', marks=pytest.mark.full)])
def test_programs_that_convert_models_do_not_keep_memory(program, flags, expected):
  done = subprocess.run([sys.executable, '-c', PROGRAM.format(program=program, flags=flags)], capture_output=True, text=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.getcwd()})
  assert done.returncode and done.stderr.startswith(expected), done.stderr
