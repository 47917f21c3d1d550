"""What every binary does first: its devices, its caches and the other processes of its run."""

import hashlib
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags, logging

from gptjax import config as configs
from gptjax import distributed, heap
from gptjax.cache import cache_dir
from gptjax.config import Config

CPU_DEVICES = flags.DEFINE_integer(
  'cpu_devices', 0, 'virtual CPU devices to run on; 0: the devices of the machine', lower_bound=0)
_CLUSTER = flags.DEFINE_enum(
  'cluster', 'auto', ['auto', 'none', *distributed.CLUSTERS], 'what tells which processes make up the run; auto: whatever is there')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT where process 0 listens; unless a cluster tells it')
_PROCESSES = flags.DEFINE_integer('processes', None, 'processes of the run; unless a cluster tells it', lower_bound=1)
_PROCESS = flags.DEFINE_integer('process', None, 'which of them this is, from 0 on; unless a cluster tells it', lower_bound=0)
_TIMEOUT = flags.DEFINE_float('rendezvous_timeout', 300, 'seconds within which all processes must be there', lower_bound=1)

_MAY_DIFFER = {'cpu_devices', 'cache_dir', 'cluster', 'coordinator', 'processes', 'process', 'rendezvous_timeout'}
"""Flags whose values the processes of a run need not share."""


def start(config: Config | None = None) -> Path:
  """Meets the other processes of the run, if any, and sets JAX up before its backend starts; returns the cache folder.

  Args:
    config: of the run, which must be the same in all processes.
  """
  if CPU_DEVICES.value or heap.runs_on_cpu():
    heap.keep_freed_memory()  # first, because threads that exist already may have heaps of their own
  logging.set_verbosity(logging.FATAL)  # what libraries log of a failure, they also raise
  sys.unraisablehook = _tell_unraisable
  cache = cache_dir()
  group = distributed.discover(_CLUSTER.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  # Before JAX is imported, which takes seconds: who is missing is told early.
  configs.exit_stack.enter_context(distributed.join(group, _facts(config) if group.count > 1 else {}, _TIMEOUT.value))
  import jax  # only now: --help and mistakes in flags should not wait for it
  if CPU_DEVICES.value:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', CPU_DEVICES.value)
  jax.config.update('jax_compilation_cache_dir', str(cache / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  if group.count > 1:
    _initialize(group)
  return cache


def _tell_unraisable(unraisable: Any) -> None:
  """As Python does, but for what TensorStore's threads have left when a save failed: a traceback for each array, of a closed loop."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _initialize(group: distributed.GroupSpec) -> None:
  import jax
  assert group.coordinator
  _keep_stdout(group.index == 0)
  host, port = distributed.bind_address(group), group.coordinator.rpartition(':')[2]
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # A proxy of the login shell would stand between the processes: gRPC asks it for every host that is not named here.
  os.environ['no_grpc_proxy'] = ','.join(filter(None, (os.environ.get('no_grpc_proxy'), distributed.address(group)[0])))
  jax.config.update('jax_check_proxy_envs', False)
  jax.distributed.initialize(
    group.coordinator, group.count, group.index, local_device_ids=group.gpus, cluster_detection_method='deactivate',
    coordinator_bind_address=f'{f"[{host}]" if ":" in host else host}:{port}' if host else None, initialization_timeout=int(_TIMEOUT.value))


def _keep_stdout(first: bool) -> None:
  """Leaves stdout to what Python prints, and to process 0: Gloo's C++ greets there, and others would say the same once more."""
  ours = os.dup(1)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  sys.stdout.flush()
  os.dup2(nowhere, 1)
  sys.stdout = open(ours if first else nowhere, 'w', encoding=sys.stdout.encoding, buffering=1 if os.isatty(ours) else -1)


def _facts(config: Config | None) -> dict[str, str]:
  """What all processes of a run must have alike: code, versions, config and flags."""
  root = Path(__file__).parent
  code = hashlib.sha256()
  for file in sorted(root.rglob('*.py')):
    code.update(file.read_bytes())
  facts = {'gptjax': f'code {code.hexdigest()[:12]}', 'python': sys.version.split()[0]}
  facts |= {name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')}
  facts |= {f'--{flag.name}': repr(flag.value) for flag in configs.own_flags() if flag.name not in _MAY_DIFFER}
  facts |= {f'--config.{name}': repr(value) for name, value in (configs.flatten(config) if config else {}).items()}
  # Long texts by their digest: all facts go into one message.
  return {name: text if len(text) <= 100 else f'{text[:50]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})'
          for name, text in facts.items()}
