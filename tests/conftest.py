"""Fixtures and settings of all tests: two tiers, eight virtual CPU devices, meshes, tiny random models.

`make test` runs every property at its smallest. Tests and parameters marked `full` prove the same properties for more cases, at more
processes or by complete runs; only `make test-all` runs those, and with it the coverage and the checks of annotated types and shapes.
"""

import collections
import functools
import gc
import os
import pathlib
from importlib import metadata

import numpy as np
import pytest
from commands import cpu_seconds, end_server

ROOT = pathlib.Path(__file__).parents[1]

WITHOUT_JAX = ('config', 'data', 'launch', 'distributed', 'sources', 'tools', 'guide')
"""Rooms whose tests start without JAX, which takes seconds to import."""

STYLES = {
    'gpt2': {'positions': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'bias': True, 'tied': True},
    'modern': {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'tied': False,
               'kv_heads': 2, 'qk_norm': 'head', 'mlp_width': 48},
}


# Commands that tests start compile as quickly as the tests themselves: with all optimizations a small run spends most of its time there.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')  # lines of source of each operation, which nothing here reads
if metadata.version('jaxlib').startswith('0.10.'):  # newer ones know no such flag, and end
  # The older emitters compile in half the time, and a program in one part in a tenth less than one in 32 for as many threads.
  os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1')


def pytest_addoption(parser):
  parser.addoption('--typed', action='store_true', help='check annotated types and shapes of arrays at run time')


def pytest_pycollect_makemodule(module_path, parent):
  """Sets JAX up before the first test module that may use it is imported."""
  if module_path.parent.name not in WITHOUT_JAX:
    _set_up_jax(parent.config.getoption('--typed'))


UNTRACED = ('parity', 'test_attention.py', 'test_conversion.py', 'test_decoding.py', 'test_equal_on_meshes.py', 'test_fuzz.py',
            'test_likelihood.py', 'test_memory.py', 'test_meshes.py', 'test_resume.py', 'test_step.py', 'test_transformer.py')
"""Folders and files whose tests run what others run too, many times over: coverage's tracer, a fourth of their time, would find
nothing new there, and so it is not in processes that tests start."""


def pytest_collection_modifyitems(items):
  """The files of few long tests come first, so that no worker waits at the end for the other one's: whole runs, and all commands."""
  items.sort(key=lambda item: item.path.parent.name not in ('tests', 'training', 'parity'))  # stable
  for item in items:
    if {item.path.name, item.path.parent.name}.intersection(UNTRACED):
      item.add_marker('no_cover')


def pytest_configure():
  """Has fewer rounds of the garbage collector, from the first import on: they took a tenth of the time."""
  gc.set_threshold(200_000, 50, 100)


def pytest_collection_finish():
  """Leaves what was imported out of the garbage collector's rounds."""
  gc.collect()
  gc.freeze()


def _cpu_seconds():
  """User and system time of this process and of those that it started."""
  return sum(os.times()[:4]) + sum(cpu_seconds)


def pytest_sessionfinish():
  end_server()


_counted = 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Notes the CPU-seconds since the last test ended."""
  global _counted
  if call.when == 'teardown':
    before, _counted = _counted, _cpu_seconds()
    item.user_properties.append(('cpu', _counted - before))
  return (yield)


def pytest_terminal_summary(terminalreporter):
  """Prints the files that took the most CPU-seconds."""
  spent = collections.Counter()
  for report in terminalreporter.getreports(''):
    spent[report.nodeid.split('::')[0]] += dict(report.user_properties).get('cpu', 0)
  if not spent:
    return
  terminalreporter.section(f'slowest files, of {spent.total():.0f} CPU-seconds')
  for name, seconds in spent.most_common(10):
    terminalreporter.write_line(f'{seconds:6.1f}  {name}')


@functools.cache
def _set_up_jax(typed=False):
  import jax

  if typed:
    import jaxtyping
    packages = {folder.name for folder in (ROOT / 'gptjax').iterdir() if folder.is_dir()} - {'config', 'data'}  # they check themselves
    jaxtyping.install_import_hook([*(f'gptjax.{name}' for name in packages), 'experiments'], 'tiers.checked')
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  # Most of a test's time is its compile: made quickly, and kept from run to run.
  jax.config.update('jax_disable_most_optimizations', True)
  jax.config.update('jax_compilation_cache_dir', str(ROOT / '.jax_cache'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


@pytest.fixture(params=['1x1', '8x1', '4x2'])
def mesh(request):
  """The mesh that the test runs under, data x model; other sizes through parametrize('mesh', ..., indirect=True)."""
  import jax

  from gptjax.config import MeshConfig
  from gptjax.sharding import make_mesh

  mesh = make_mesh(MeshConfig(*map(int, request.param.split('x'))))
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture
def one_device():
  """A mesh of one device, in force during the test."""
  import jax

  from gptjax.config import MeshConfig
  from gptjax.sharding import make_mesh

  mesh = make_mesh(MeshConfig(1, 1))
  with jax.set_mesh(mesh):
    yield mesh


@pytest.fixture(params=STYLES)
def style(request):
  """A tiny ModelConfig of each style; 50 ids in a table of 64 rows."""
  from gptjax.config import ModelConfig

  return ModelConfig(layers=2, width=32, heads=4, vocab_size=50, vocab_multiple=32, **STYLES[request.param])


@pytest.fixture
def random_parameters():
  """A function (abstract model, zero_stage=0, seed=0): parameters on the mesh in force, biases and gains random too."""
  import jax

  def make(model, zero_stage=0, seed=0):
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in model.shapes.items():
      noise = rng.standard_normal(shape.shape, np.float32)
      values[name] = 1 + 0.2 * noise if name.endswith('gain') else 0.2 * noise
    return jax.device_put(values, model.shardings(zero_stage, jax.sharding.get_mesh()))

  return make
