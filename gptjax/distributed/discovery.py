"""Which processes make up a run and which of them this one is: from flags, or from what a cluster puts into the environment."""

import dataclasses
import importlib.util
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptjax.config import UserError

_POD_PORT = 8476
"""Where process 0 listens on machines that belong to one run alone, as pods and TPU hosts do."""

_FIELDS = {'coordinator': 'coordinator', 'processes': 'count', 'process': 'index'}
"""Flag -> field of GroupSpec."""

Metadata = Callable[[str], str | None]
"""What Google Cloud's metadata server has under a name, or None."""


@dataclasses.dataclass(frozen=True)
class GroupSpec:
  """The processes of a run, as this one sees them."""

  count: int = 1
  index: int = 0
  """of this process"""
  coordinator: str | None = None
  """HOST:PORT where process 0 listens; None: there is only one process"""
  source: str = 'no cluster'
  """where the values above were found"""
  gpus: tuple[int, ...] | None = None
  """those of this host that belong to this process; None: all that it sees"""


def discover(cluster: str = 'auto', coordinator: str | None = None, processes: int | None = None, process: int | None = None,
             environment: Mapping[str, str] = os.environ, metadata: Metadata | None = None) -> GroupSpec:
  """The group that flags give, completed by what a cluster tells.

  Args:
    cluster: auto (the first of CLUSTERS that is there, if any), none, or the name of one that must be.
    coordinator: HOST:PORT of process 0.
    processes: how many there are.
    process: number of this one.
    environment: of this process.
    metadata: asks Google Cloud's metadata server; None: where this is a TPU VM, the real one.

  Raises:
    UserError: the chosen cluster is not there, what it tells cannot be read, or flags contradict each other or do not suffice.
  """
  given: dict[str, Any] = {name: value for name, value in (('coordinator', coordinator), ('processes', processes), ('process', process))
                           if value is not None}
  found = None
  if len(given) < 3 and processes != 1:
    found = _look(cluster, given, environment, metadata or _metadata_server())
  group = dataclasses.replace(found or GroupSpec(), **{_FIELDS[name]: value for name, value in given.items()})
  if given:
    group = dataclasses.replace(group, source='flags' if not found else f'flags and {found.source}')
  if found is None and processes != 1:
    for name, wanted in (('processes', 'how many processes there are'), ('process', 'which of them this is, from 0 on'),
                         ('coordinator', 'HOST:PORT where process 0 listens')):
      if given and name not in given:
        raise UserError(f'--{name}', None, f'{wanted}, with --{next(iter(given))}, since no cluster tells it')
  if not 0 <= group.index < group.count:
    raise UserError('--process', group.index, f'0 to {group.count - 1} with --processes={group.count}')
  if group.count == 1:
    return GroupSpec(source=group.source)
  if group.coordinator is None:
    raise UserError('--coordinator', None, f'HOST:PORT where process 0 listens, since {group.source} does not tell')
  host, _, port = group.coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise UserError('--coordinator', group.coordinator, 'HOST:PORT with a port from 1 to 65535')
  return group


def _look(cluster: str, given: Mapping[str, object], environment: Mapping[str, str], metadata: Metadata) -> GroupSpec | None:
  if cluster == 'none':
    return None
  for name, (finder, looked_for) in CLUSTERS.items():
    if cluster in ('auto', name):
      try:
        group = finder(environment, metadata, given)
      except (KeyError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
          raise
        raise UserError('--cluster', name, f'--cluster=none, or all that {name} sets: {looked_for}; what is here cannot be read '
                        f'({type(error).__name__}: {error})') from None
      if group:
        return group
      if cluster == name:
        raise UserError('--cluster', name, f'a cluster that is here; looked for {looked_for}')
  return None


def _slurm(environment: Mapping[str, str], metadata: Metadata, given: Mapping[str, object]) -> GroupSpec | None:
  if not {'SLURM_JOB_ID', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_STEP_NODELIST'} <= environment.keys():
    return None  # as in a batch script, outside of srun
  job = f'{environment["SLURM_JOB_ID"]}.{environment.get("SLURM_STEP_ID", "0")}'
  host = first_host(environment['SLURM_STEP_NODELIST'])
  here = None
  if 'SLURM_STEP_TASKS_PER_NODE' in environment:
    here = _tasks_per_node(environment['SLURM_STEP_TASKS_PER_NODE'])[int(environment.get('SLURM_NODEID', 0))]
  return GroupSpec(int(environment.get('SLURM_STEP_NUM_TASKS', environment['SLURM_NTASKS'])), int(environment['SLURM_PROCID']),
               f'{host}:{_port(job)}', f'Slurm step {job}', _gpus(environment, environment.get('SLURM_LOCALID'), here))


def first_host(hosts: str) -> str:
  """The first name of a Slurm host list: 'gpu[003-005,9]-ib,login' begins with 'gpu003-ib'."""
  match = re.match(r'(?:[^,\[\]]|\[[^\]]+\])+', hosts)
  if not match:
    raise ValueError(f'no host in {hosts!r}')
  return re.sub(r'\[(\d+)[^\]]*\]', r'\1', match[0])


def _tasks_per_node(text: str) -> list[int]:
  """'2(x3),1' -> [2, 2, 2, 1]."""
  counts = []
  for part in text.split(','):
    count, _, times = part.rstrip(')').partition('(x')
    counts += [int(count)] * int(times or 1)
  return counts


def _open_mpi(environment: Mapping[str, str], metadata: Metadata, given: Mapping[str, object]) -> GroupSpec | None:
  if not {'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'} <= environment.keys():
    return None
  processes, here = int(environment['OMPI_COMM_WORLD_SIZE']), int(environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', 0))
  uri = environment.get('OMPI_MCA_orte_hnp_uri', '')  # of mpirun: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; not since Open MPI 5
  address = re.search(r'tcp://([^,:]+)|tcp6://\[([^,\]]+)', uri)
  job = uri.partition('.')[0] or environment.get('PMIX_NAMESPACE', '')
  host = 'localhost' if here == processes else (address[1] or f'[{address[2]}]') if address else None
  return GroupSpec(processes, int(environment['OMPI_COMM_WORLD_RANK']), f'{host}:{_port(job)}' if host else None,
               f'Open MPI job {job or "of unknown name"}', _gpus(environment, environment.get('OMPI_COMM_WORLD_LOCAL_RANK'), here))


def _kubernetes(environment: Mapping[str, str], metadata: Metadata, given: Mapping[str, object]) -> GroupSpec | None:
  if not {'JOB_COMPLETION_INDEX', 'JOBSET_NAME', 'REPLICATED_JOB_NAME'} <= environment.keys():
    return None
  if 'processes' not in given:  # nothing in a pod says how many pods there are
    raise UserError('--processes', None, 'the parallelism of the JobSet, which its pods are not told')
  name = environment['JOBSET_NAME']
  # Pods are JOBSET-REPLICATED_JOB-JOB-POD, and found through the headless service that has the name of the JobSet.
  return GroupSpec(0, int(environment['JOB_COMPLETION_INDEX']), f'{name}-{environment["REPLICATED_JOB_NAME"]}-0-0.{name}:{_POD_PORT}',
               f'JobSet {name}')


def _tpu(environment: Mapping[str, str], metadata: Metadata, given: Mapping[str, object]) -> GroupSpec | None:
  """A TPU slice, or several: GKE tells in the environment, TPU VMs through the metadata server."""
  names = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
  worker = environment.get('TPU_WORKER_ID')
  where, slices = 'environment', environment
  if not names or worker is None or names.startswith('WARNING'):  # what libtpu sets, for child processes too, where it finds none
    where, names, worker = 'metadata server', metadata('worker-network-endpoints'), metadata('agent-worker-number')
    if not names or worker is None:
      return None
    pairs = re.findall(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", metadata('tpu-env') or '', re.MULTILINE)
    slices = {**dict(pairs), **{name: value for name, value in environment.items() if name.startswith('MEGASCALE_')}}
  # An endpoint is a host, HOST:PORT, or NAME:NUMBER:ADDRESS.
  parts = [one.strip().split(':') for one in names.split(',')]
  hosts = [part[2] if len(part) == 3 else part[0] for part in parts]
  count, this = int(slices.get('MEGASCALE_NUM_SLICES') or 1), int(slices.get('MEGASCALE_SLICE_ID') or 0)
  leader = (slices.get('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]).partition(':')[0]
  return GroupSpec(count * len(hosts), this * len(hosts) + int(worker), f'{leader}:{_POD_PORT}',
               f'TPU {where}: {count} slice(s) of {len(hosts)} host(s)')


CLUSTERS: dict[str, tuple[Callable[[Mapping[str, str], Metadata, Mapping[str, object]], GroupSpec | None], str]] = {
  'tpu': (_tpu, 'TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, or worker-network-endpoints of the metadata server of a TPU VM'),
  'slurm': (_slurm, 'SLURM_JOB_ID, SLURM_PROCID, SLURM_NTASKS and SLURM_STEP_NODELIST, which srun sets'),
  'openmpi': (_open_mpi, 'OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE, which mpirun sets'),
  'kubernetes': (_kubernetes, 'JOB_COMPLETION_INDEX, which Kubernetes sets, and JOBSET_NAME and REPLICATED_JOB_NAME, which the '
                              "JobSet's manifest must"),
}
"""Name -> (what reads it, what it looks for), in the order in which they are looked for."""


def _port(job: str) -> int:
  """One port for all processes of a job, above those that systems hand out, and seldom that of another job."""
  return 61440 + zlib.crc32(job.encode()) % 4096


def _gpus(environment: Mapping[str, str], local: str | None, here: int | None) -> tuple[int, ...] | None:
  """The visible GPUs that process `local` of `here` on this host takes; None: they are shared out already, or there are none."""
  visible = environment.get('CUDA_VISIBLE_DEVICES')
  count = len(visible.split(',')) if visible else sum(bool(re.fullmatch(r'nvidia\d+', file.name)) for file in Path('/dev').iterdir())
  bound = any(name in environment for name in ('SLURM_GPUS_PER_TASK', 'SLURM_TRES_PER_TASK'))  # each task sees its own alone
  if bound or local is None or not here or here == 1 or count < here:
    return None
  return tuple(range(int(local) * count // here, (int(local) + 1) * count // here))


def _metadata_server() -> Metadata:
  """Asks Google Cloud's metadata server on a machine with TPUs, and nothing on others."""
  chips = any(Path('/dev').glob('accel[0-9]*')) or any(Path('/dev/vfio').glob('[0-9]*'))
  if not chips or importlib.util.find_spec('libtpu') is None:
    return lambda name: None

  def ask(name: str) -> str | None:
    host = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
    request = urllib.request.Request(f'http://{host}/computeMetadata/v1/instance/attributes/{name}', headers={'Metadata-Flavor': 'Google'})
    try:
      with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()
    except urllib.error.HTTPError as error:
      if error.code == 404:
        return None
      raise UserError('--cluster', 'tpu', f'--cluster=none, or a metadata server that tells {name}; it answers {error.code}') from None
    except OSError:
      return None

  return ask
