"""The group that each cluster's environment describes, and errors where flags and clusters do not suffice."""

import pytest

from gptjax.config import UserError
from gptjax.distributed import GroupSpec, discover

SLURM = {'SLURM_JOB_ID': '4711', 'SLURM_STEP_ID': '2', 'SLURM_PROCID': '3', 'SLURM_NTASKS': '4', 'SLURM_NODEID': '1', 'SLURM_LOCALID': '1',
         'SLURM_STEP_NODELIST': 'gpu[007-008]', 'SLURM_STEP_TASKS_PER_NODE': '2(x2)'}
MPI = {'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
       'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}
JOBSET = {'JOB_COMPLETION_INDEX': '5', 'JOBSET_NAME': 'gpt', 'REPLICATED_JOB_NAME': 'workers'}
GKE = {'TPU_WORKER_HOSTNAMES': 'a-0.svc,a-1.svc', 'TPU_WORKER_ID': '1'}
SLICES = GKE | {'MEGASCALE_NUM_SLICES': '3', 'MEGASCALE_SLICE_ID': '2', 'MEGASCALE_COORDINATOR_ADDRESS': 'first-0.svc:8081'}
VM = {'worker-network-endpoints': 'unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3', 'agent-worker-number': '1',
      'tpu-env': "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\n"
                 "MEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.9.9'\n"}


def found(environment, cluster='auto', metadata=None, **given):
  return discover(cluster, environment=environment, metadata=(metadata or {}).get, **given)


@pytest.mark.parametrize('environment, metadata, processes, process, host', [
  (SLURM, {}, 4, 3, 'gpu007'),
  (SLURM | {'SLURM_STEP_NODELIST': 'a-[3,5]-ib[0-1],b'}, {}, 4, 3, 'a-3-ib0'),
  (SLURM | {'SLURM_STEP_NODELIST': 'login,gpu[1-3]', 'SLURM_STEP_NUM_TASKS': '8'}, {}, 8, 3, 'login'),
  (MPI, {}, 4, 1, '10.96.0.1'),
  (MPI | {'OMPI_MCA_orte_hnp_uri': '7.0;tcp6://[fe80::b9b,2620::2]:43370'}, {}, 4, 1, '[fe80::b9b]'),
  ({**MPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '4', 'OMPI_MCA_orte_hnp_uri': ''}, {}, 4, 1, 'localhost'),
  (GKE, {}, 2, 1, 'a-0.svc'),
  (SLICES, {}, 6, 5, 'first-0.svc'),
  ({}, {name: value for name, value in VM.items() if name != 'tpu-env'}, 2, 1, '10.0.0.2'),
  ({}, VM, 4, 3, '10.0.9.9'),
  ({'TPU_WORKER_HOSTNAMES': 'WARNING: none', 'TPU_WORKER_ID': '0'}, VM, 4, 3, '10.0.9.9'),  # libtpu's, inherited
])
def test_a_cluster_s_environment_gives_count_index_and_coordinator(environment, metadata, processes, process, host):
  group = found(environment, metadata=metadata)
  address, _, port = group.coordinator.rpartition(':')
  assert (group.count, group.index, address) == (processes, process, host) and 1024 < int(port) < 2**16


@pytest.mark.parametrize('inner, outer, source', [
  (MPI, SLURM | {'SLURM_GPUS_PER_TASK': '4', 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}, 'Open MPI'),
  (MPI, GKE, 'Open MPI'), (MPI, JOBSET, 'Open MPI'), (GKE, SLURM, 'TPU'), (SLURM, JOBSET, 'Slurm'), (GKE, JOBSET, 'TPU'),
])
def test_the_innermost_launcher_counts(inner, outer, source):
  assert found(inner | outer) == found(inner) and found(inner).source.startswith(source)
  gpus = lambda environment: found(environment | {'CUDA_VISIBLE_DEVICES': '0,1,2,3'}).gpus
  assert gpus(inner | outer) == gpus(inner)


def test_processes_of_one_job_agree_on_a_port_and_jobs_differ():
  port = lambda **more: found(SLURM | more).coordinator
  assert port() == port(SLURM_PROCID='0', SLURM_NODEID='0') != port(SLURM_JOB_ID='4712')
  assert port() != port(SLURM_STEP_ID='3')


def test_a_pod_of_a_jobset_needs_the_number_of_processes():
  group = found(JOBSET, processes=8)
  assert (group.count, group.index) == (8, 5) and group.coordinator.startswith('gpt-workers-0-0.gpt:')
  with pytest.raises(UserError, match='^--processes: None, expected: the number of processes, since JobSet gpt does not'):
    found(JOBSET)


def test_gpus_of_a_host_are_divided_unless_the_launcher_assigned_them():
  gpus = lambda visible, environment=SLURM: found(environment | {'CUDA_VISIBLE_DEVICES': visible}).gpus
  assert gpus('0,1,2,3') == (2, 3) and gpus('4,6') == (1,) and gpus('1') is None
  assert gpus('0,1,2,3', MPI) == (2, 3)
  assert gpus('0,1', SLURM | {'SLURM_STEP_TASKS_PER_NODE': '3,1'}) is None  # one process on this host has them all


@pytest.mark.parametrize('environment', [
  {}, {'SLURM_JOB_ID': '1', 'SLURM_PROCID': '0', 'SLURM_NTASKS': '4'},  # a batch script, outside of srun
  SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}, {'JOB_COMPLETION_INDEX': '0'},
  {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
])
def test_a_single_process_needs_no_coordinator(environment):
  group = found(environment)
  assert (group.count, group.index, group.coordinator) == (1, 0, None)


def test_flags_take_precedence_and_clusters_complete_them():
  assert found(SLURM, coordinator='h:1', processes=2, process=1) == GroupSpec(2, 1, 'h:1', 'flags')
  assert found(SLURM, coordinator='h:1').coordinator == 'h:1' and found(SLURM, coordinator='h:1').index == 3
  assert found(SLURM, cluster='none').count == 1
  assert found(SLURM, processes=1).count == 1
  assert found(SLURM | GKE, cluster='slurm').count == 4 and found(SLURM | GKE).count == 2


@pytest.mark.parametrize('given, message', [
  ({'processes': 4}, '--process: None, expected: the index of this process, from 0 on'),
  ({'process': 0}, '--processes: None, expected: the number of processes'),
  ({'coordinator': 'h:1'}, '--processes: None, expected: the number of processes'),
  ({'processes': 4, 'process': 1}, '--coordinator: None, expected: HOST:PORT'),
  ({'processes': 4, 'process': 4, 'coordinator': 'h:1'}, '--process: 4, expected: 0 to 3 with --processes=4'),
  ({'processes': 1, 'process': 1}, '--process: 1, expected: 0 to 0'),
  ({'processes': 2, 'process': 1, 'coordinator': 'h'}, "--coordinator: 'h', expected: HOST:PORT"),
  ({'processes': 2, 'process': 1, 'coordinator': 'h:70000'}, "--coordinator: 'h:70000', expected: HOST:PORT"),
  ({'cluster': 'slurm'}, "--cluster: 'slurm', expected: a cluster that is detected here, by SLURM_JOB_ID, SLURM_PROCID"),
  ({'cluster': 'openmpi'}, "--cluster: 'openmpi', expected: a cluster that is detected here, by OMPI_COMM_WORLD_RANK"),
  ({'cluster': 'kubernetes', 'processes': 2}, "--cluster: 'kubernetes', expected: a cluster that is detected here, by JOB_COMPLETION"),
  ({'cluster': 'tpu'}, "--cluster: 'tpu', expected: a cluster that is detected here, by TPU_WORKER_HOSTNAMES"),
])
def test_insufficient_flags_are_a_one_line_error(given, message):
  with pytest.raises(UserError) as caught:
    found({}, **given)
  assert str(caught.value).startswith(message)


@pytest.mark.parametrize('environment, message', [
  (SLURM | {'SLURM_NTASKS': 'four'}, "--cluster: 'slurm', expected: --cluster=none, or everything that slurm sets: SLURM_JOB_ID"),
  (SLURM | {'SLURM_STEP_NODELIST': ''}, "--cluster: 'slurm', expected: --cluster=none"),
  (SLURM | {'SLURM_PROCID': '4'}, '--process: 4, expected: 0 to 3'),
  (MPI | {'OMPI_MCA_orte_hnp_uri': ''}, '--coordinator: None, expected: HOST:PORT where process 0 listens, since Open MPI job'),
])
def test_unreadable_variables_are_a_one_line_error(environment, message):
  with pytest.raises(UserError) as caught:
    found(environment)
  assert str(caught.value).startswith(message)
