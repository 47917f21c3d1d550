"""Which processes make up a run and which of them this one is: from flags, or from the environment that a cluster sets.

JAX has such detectors too; these come before JAX is imported, know several slices and JobSets, and name the variable that is missing.
"""

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.distributed.cloud import vm_attribute

_POD_PORT = 8476
"""Port of process 0 on machines that run nothing else, such as pods and TPU hosts."""
_FLAGS = {'processes': ('count', 'the number of processes'), 'process': ('index', 'the index of this process, from 0 on'),
          'coordinator': ('coordinator', 'HOST:PORT where process 0 listens')}
"""Flag -> (field of GroupSpec, its meaning)."""

Environment = Mapping[str, str]
Metadata = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class GroupSpec:
  """The processes of a run, as this one sees them."""

  count: int = 1
  """number of processes; 0: the cluster does not report it"""
  index: int = 0
  """index of this process"""
  coordinator: str | None = None
  """HOST:PORT where process 0 listens; None: there is only one process"""
  source: str = 'no cluster'
  """where these values come from"""
  gpus: tuple[int, ...] | None = None
  """those of this host that belong to this process; None: all that it sees"""


def discover(cluster: str = 'auto', coordinator: str | None = None, processes: int | None = None, process: int | None = None,
             environment: Environment = os.environ, metadata: Metadata = vm_attribute) -> GroupSpec:
  """The group that the flags of these names describe, completed by the cluster.

  `cluster` is auto (the first of CLUSTERS that is detected, if any), none, or the name of the one that is required. Raises a UserError if
  that is not detected, its variables cannot be read, or the flags are contradictory or incomplete.
  """
  values: dict[str, Any] = {'processes': processes, 'process': process, 'coordinator': coordinator}
  given = [flag for flag in _FLAGS if values[flag] is not None]
  detected = _detect(cluster, environment, metadata) if len(given) < len(_FLAGS) and processes != 1 else None
  group = dataclasses.replace(detected or GroupSpec(), **{_FLAGS[flag][0]: values[flag] for flag in given})
  if given:
    group = dataclasses.replace(group, source=f'flags and {detected.source}' if detected else 'flags')
  for flag, (_, meaning) in _FLAGS.items():
    if given and flag not in given and not detected and processes != 1:
      raise UserError(f'--{flag}', None, f'{meaning}, with --{given[0]}, since no cluster reports it')
  if not group.count:
    raise UserError('--processes', None, f'the number of processes, since {group.source} does not report it')
  if not 0 <= group.index < group.count:
    raise UserError('--process', group.index, f'0 to {group.count - 1} with --processes={group.count}')
  if group.count == 1:
    return GroupSpec(source=group.source)
  if group.coordinator is None:
    raise UserError('--coordinator', None, f'HOST:PORT where process 0 listens, since {group.source} does not report it')
  host, _, port = group.coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError('--coordinator', group.coordinator, 'HOST:PORT with a port from 1 to 65535')
  return group


def _detect(cluster: str, environment: Environment, metadata: Metadata) -> GroupSpec | None:
  for name, (detector, required, variables) in CLUSTERS.items():
    if cluster in ('auto', name):
      try:
        group = detector(environment, metadata) if {*required} <= environment.keys() else None
      except (KeyError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
          raise
        raise UserError('--cluster', name, f'--cluster=none, or everything that {name} sets: {variables}; its values cannot be read '
                        f'({type(error).__name__}: {error})') from None
      if group:
        return group
      if cluster == name:
        raise UserError('--cluster', name, f'a cluster that is detected here, by {variables}')
  return None


def _slurm(environment: Environment, metadata: Metadata) -> GroupSpec:
  job = f'{environment["SLURM_JOB_ID"]}.{environment.get("SLURM_STEP_ID", "0")}'
  first = re.findall(r'(?:[^,\[\]]|\[[^\]]+\])+', environment['SLURM_STEP_NODELIST'])[0]
  host = re.sub(r'\[(\d+)[^\]]*\]', r'\1', first)  # gpu[003-005,9]-ib -> gpu003-ib
  local_count = None
  if tasks := environment.get('SLURM_STEP_TASKS_PER_NODE'):  # of each node: 2(x3),1 -> [2, 2, 2, 1]
    counts = [int(count) for count, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', tasks) for _ in range(int(times or 1))]
    local_count = counts[int(environment.get('SLURM_NODEID', 0))]
  assigned = any(name in environment for name in ('SLURM_GPUS_PER_TASK', 'SLURM_TRES_PER_TASK'))  # each task sees only its own
  gpus = None if assigned else _gpus(environment, environment.get('SLURM_LOCALID'), local_count)
  return GroupSpec(int(environment.get('SLURM_STEP_NUM_TASKS', environment['SLURM_NTASKS'])), int(environment['SLURM_PROCID']),
                   f'{host}:{_port(job)}', f'Slurm step {job}', gpus)


def _open_mpi(environment: Environment, metadata: Metadata) -> GroupSpec:
  count, local_count = int(environment['OMPI_COMM_WORLD_SIZE']), int(environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', 0))
  uri = environment.get('OMPI_MCA_orte_hnp_uri', '')  # of mpirun: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; until Open MPI 4
  address = re.search(r'tcp://([^,:]+)|tcp6://\[([^,\]]+)', uri)
  job = uri.partition('.')[0] or environment.get('PMIX_NAMESPACE', '')
  gpus = _gpus(environment, environment.get('OMPI_COMM_WORLD_LOCAL_RANK'), local_count)
  host = 'localhost' if local_count == count else (address[1] or f'[{address[2]}]') if address else None
  return GroupSpec(count, int(environment['OMPI_COMM_WORLD_RANK']), f'{host}:{_port(job)}' if host else None,
                   f'Open MPI job {job or "of unknown name"}', gpus)


def _kubernetes(environment: Environment, metadata: Metadata) -> GroupSpec:
  name = environment['JOBSET_NAME']
  # Pods are named JOBSET-REPLICATED_JOB-JOB-POD and resolve through the headless service that has the JobSet's name.
  return GroupSpec(0, int(environment['JOB_COMPLETION_INDEX']), f'{name}-{environment["REPLICATED_JOB_NAME"]}-0-0.{name}:{_POD_PORT}',
                   f'JobSet {name}')


def _tpu(environment: Environment, metadata: Metadata) -> GroupSpec | None:
  """One or several TPU slices: GKE describes them in the environment, TPU VMs through the metadata server."""
  names = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
  worker = environment.get('TPU_WORKER_ID')
  source, slices = 'environment', environment
  if not names or worker is None or names.startswith('WARNING'):  # libtpu sets this, also for child processes, where it finds none
    source, names, worker = 'metadata server', metadata('worker-network-endpoints'), metadata('agent-worker-number')
    if not names or worker is None:
      return None
    pairs = re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", metadata('tpu-env') or '', re.MULTILINE)
    slices = {**dict(pairs), **{name: value for name, value in environment.items() if name.startswith('MEGASCALE_')}}
  # An endpoint is a host, HOST:PORT, or NAME:NUMBER:ADDRESS.
  parts = [endpoint.strip().split(':') for endpoint in names.split(',')]
  hosts = [part[2] if len(part) == 3 else part[0] for part in parts]
  count, this = int(slices.get('MEGASCALE_NUM_SLICES') or 1), int(slices.get('MEGASCALE_SLICE_ID') or 0)
  leader = (slices.get('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]).partition(':')[0]
  return GroupSpec(count * len(hosts), this * len(hosts) + int(worker), f'{leader}:{_POD_PORT}',
                   f'TPU {source}: {count} slice(s) of {len(hosts)} host(s)')


_SLURM = ('SLURM_JOB_ID', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_STEP_NODELIST')  # a batch script, outside of srun, lacks some of them
_OPEN_MPI = ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE')
_JOBSET = ('JOB_COMPLETION_INDEX', 'JOBSET_NAME', 'REPLICATED_JOB_NAME')
CLUSTERS: dict[str, tuple[Callable[[Environment, Metadata], GroupSpec | None], tuple[str, ...], str]] = {
  'openmpi': (_open_mpi, _OPEN_MPI, f'{", ".join(_OPEN_MPI)}, which mpirun sets'),
  'tpu': (_tpu, (), 'TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, or worker-network-endpoints of the metadata server of a TPU VM'),
  'slurm': (_slurm, _SLURM, f'{", ".join(_SLURM)}, which srun sets'),
  'kubernetes': (_kubernetes, _JOBSET, 'JOB_COMPLETION_INDEX, which Kubernetes sets, and JOBSET_NAME and REPLICATED_JOB_NAME, which the '
                                       "JobSet's manifest must set"),
}
"""Name -> (detector, the variables that it requires, a description of those), in the order of detection. A process inherits the variables
of all that it runs within; mpirun, which may run within a Slurm step, on TPU VMs or in a pod, comes first as the innermost."""


def _port(job: str) -> int:
  """Returns a port that all processes of a job compute alike, above the ephemeral range, and that two jobs rarely share."""
  return 61440 + zlib.crc32(job.encode()) % 4096


def visible_gpus(environment: Environment) -> list[str]:
  """The GPUs of this host, as CUDA_VISIBLE_DEVICES names them; found without the driver, which JAX is to open first."""
  if visible := environment.get('CUDA_VISIBLE_DEVICES'):
    return visible.split(',')
  return [match[1] for file in sorted(Path('/dev').iterdir()) if (match := re.fullmatch(r'nvidia(\d+)', file.name))]


def _gpus(environment: Environment, local_index: str | None, local_count: int | None) -> tuple[int, ...] | None:
  """Indices among the visible GPUs for one of the processes on this host; None: there are too few."""
  gpus = len(visible_gpus(environment))
  if local_index is None or not local_count or local_count == 1 or gpus < local_count:
    return None
  return tuple(range(int(local_index) * gpus // local_count, (int(local_index) + 1) * gpus // local_count))
