"""Start of every binary: the processes of the run meet, and JAX is set up."""

import hashlib
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax import distributed, heap, signals
from gptjax.cache import cache_dir
from gptjax.config import Config

CPU_DEVICES = flags.DEFINE_integer(
  'cpu_devices', 0, 'number of virtual CPU devices to run on; 0: the devices of the machine', lower_bound=0)
_CLUSTER = flags.DEFINE_enum(
  'cluster', 'auto', ['auto', 'none', *distributed.CLUSTERS],
  'where the processes of the run are read from; auto: the first that is detected')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT where process 0 listens; default: from the cluster')
_PROCESSES = flags.DEFINE_integer('processes', None, 'number of processes of the run; default: from the cluster', lower_bound=1)
_PROCESS = flags.DEFINE_integer('process', None, 'index of this process, from 0 on; default: from the cluster', lower_bound=0)
_TIMEOUT = flags.DEFINE_float('rendezvous_timeout', 300, 'seconds within which all processes must join', lower_bound=1)

_MAY_DIFFER = {'cpu_devices', 'cache_dir', 'cluster', 'coordinator', 'processes', 'process', 'rendezvous_timeout'}
"""Flags that may differ between the processes of a run."""


def start(config: Config | None = None, keeps_memory: bool = True) -> Path:
  """Meets the other processes of the run, if any, whose configs must be equal, and sets up JAX; returns the cache folder.

  `keeps_memory`: whether freed memory is reused instead of returned to the system, which is faster if a program runs one step many times,
  and needs more memory if it builds large arrays once.
  """
  if keeps_memory and (CPU_DEVICES.value or heap.runs_on_cpu()):
    heap.keep_freed_memory()  # first, because a thread that is already running may have an arena of its own
  signals.watch()
  sys.unraisablehook = _report_unraisable
  cache = cache_dir()
  group = distributed.discover(_CLUSTER.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  # Before JAX is imported, which takes seconds.
  configs.exit_stack.enter_context(distributed.join(group, _facts(config) if group.count > 1 else {}, _TIMEOUT.value))
  import jax  # not at the top: --help and errors in flags do not wait for it
  if CPU_DEVICES.value:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', CPU_DEVICES.value)
  jax.config.update('jax_compilation_cache_dir', str(cache / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  if group.count > 1:
    _initialize(group)
  return cache


def _report_unraisable(unraisable: Any) -> None:
  """As Python does, but ignores the threads of TensorStore after a failed save, which report a closed event loop per array."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _initialize(group: distributed.GroupSpec) -> None:
  import jax
  assert group.coordinator
  _keep_stdout(group.index == 0)
  host, port = distributed.bind_address(group), group.coordinator.rpartition(':')[2]
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # gRPC would use the proxy of a login shell between the processes for every host that is not listed here.
  os.environ['no_grpc_proxy'] = ','.join(filter(None, (os.environ.get('no_grpc_proxy'), distributed.address(group)[0])))
  jax.config.update('jax_check_proxy_envs', False)
  jax.distributed.initialize(
    group.coordinator, group.count, group.index, local_device_ids=group.gpus, cluster_detection_method='deactivate',
    coordinator_bind_address=f'{f"[{host}]" if ":" in host else host}:{port}' if host else None, initialization_timeout=int(_TIMEOUT.value))


def _keep_stdout(first: bool) -> None:
  """Restricts stdout to Python's output in process 0: Gloo prints from C++, and the other processes would repeat the output."""
  ours = os.dup(1)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  sys.stdout.flush()
  os.dup2(nowhere, 1)
  sys.stdout = open(ours if first else nowhere, 'w', encoding=sys.stdout.encoding, errors=sys.stdout.errors,
                    buffering=1 if os.isatty(ours) else -1)


def _facts(config: Config | None) -> dict[str, str]:
  """The facts that must be equal in all processes of a run: code, versions, config and flags."""
  root = Path(__file__).parent
  code = hashlib.sha256()
  for file in sorted(root.rglob('*.py')):
    code.update(file.read_bytes())
  facts = {'gptjax': f'code {code.hexdigest()[:12]}', 'python': sys.version.split()[0]}
  facts |= {name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')}
  facts |= {f'--{flag.name}': repr(flag.value) for flag in configs.own_flags() if flag.name not in _MAY_DIFFER}
  facts |= {f'--config.{name}': repr(value) for name, value in (configs.flatten(config) if config else {}).items()}
  # Long texts are replaced by a digest, since all facts must fit into one message.
  return {name: text if len(text) <= 100 else f'{text[:50]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})'
          for name, text in facts.items()}
