"""The manifests of runs and sweeps: jobs and pods by Kubernetes' schema, the JobSet around them by its reference; all counts agree."""

import math
import re

import kubernetes_validate
import pytest
import yaml
from commands import ROOT, run_module

from gptjax import config as configs

MANIFESTS = {name: (ROOT / f'tools/launch/jobset_{name}.yaml').read_text() for name in ('tpu', 'gpu')}
SWEEP = (ROOT / 'tools/launch/sweep_job.yaml').read_text()
CHIPS = {'tpu': 'google.com/tpu', 'gpu': 'nvidia.com/gpu'}
KUBERNETES = '1.30'
"""The oldest release that the manifests are written for."""

ENVELOPE = {  # fields of jobset.x-k8s.io/v1alpha2 that we use
  '': {'apiVersion', 'kind', 'metadata', 'spec'},
  'metadata': {'name', 'annotations'},
  'spec': {'network', 'failurePolicy', 'replicatedJobs'},
  'network': {'enableDNSHostnames', 'publishNotReadyAddresses', 'subdomain'},
  'failurePolicy': {'maxRestarts', 'rules'},
  'rule': {'name', 'action', 'onJobFailureReasons'},
  'job': {'name', 'replicas', 'template'},
}


def only(part, tree):
  """Raises for a field that is none."""
  assert not set(tree) - ENVELOPE[part], f'{part}: {set(tree) - ENVELOPE[part]}'
  return tree


def check(kind, text):
  """Raises for a manifest that a cluster would refuse, or whose numbers do not agree."""
  jobset = only('', yaml.safe_load(text))
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  name, spec = only('metadata', jobset['metadata'])['name'], only('spec', jobset['spec'])
  assert only('network', spec['network'])['enableDNSHostnames'] is True
  assert only('failurePolicy', spec['failurePolicy'])['maxRestarts'] > 0
  for rule in spec['failurePolicy']['rules']:
    assert only('rule', rule)['action'] in ('FailJobSet', 'RestartJobSet') and rule['onJobFailureReasons'] == ['PodFailurePolicy']
  (job,) = spec['replicatedJobs']
  only('job', job)
  kubernetes_validate.validate(
    {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': f'{name}-{job["name"]}-0'}, **job['template']}, KUBERNETES, strict=True)
  hosts, pod = job['template']['spec']['parallelism'], job['template']['spec']['template']['spec']
  last_host = f'{name}-{job["name"]}-{job["replicas"] - 1}-{hosts - 1}'
  assert re.fullmatch(r'[a-z]([a-z0-9-]*[a-z0-9])?', last_host) and len(last_host) < 64  # a host name
  assert job['template']['spec']['completions'] == hosts and job['template']['spec']['completionMode'] == 'Indexed'
  assert pod['restartPolicy'] == 'Never'  # what podFailurePolicy asks for; the schema has any text
  (container,) = pod['containers']
  assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}
  reasons = job['template']['spec']['podFailurePolicy']['rules']
  assert [(rule['action'], rule['onExitCodes']['containerName'], rule['onExitCodes']['values']) for rule in reasons] == [
    ('FailJob', container['name'], [2]), ('Ignore', container['name'], [75])]
  check_counts(kind, container, pod, hosts, job['replicas'])
  labels = {'jobset.sigs.k8s.io/jobset-name': name, 'jobset.sigs.k8s.io/replicatedjob-name': job['name']}  # JobSet's, of every pod
  check_meeting(kind, container, labels, hosts)


def check_counts(kind, container, pod, hosts, replicas):
  chips = container['resources']['limits'][CHIPS[kind]]
  if kind == 'tpu':
    topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
    assert math.prod(map(int, topology.split('x'))) == hosts * chips
  config = resolved(container['args'])
  mesh = config.mesh
  assert mesh.replica * mesh.data * mesh.model == replicas * hosts * chips
  assert mesh.replica == replicas and config.microbatch_size % (mesh.replica * mesh.data) == 0


def check_meeting(kind, container, labels, hosts):
  """TPU pods find out how many they are; pods of GPUs are told that, and where their names stand."""
  given = [arg for arg in container['args'] if arg.startswith('--process')]
  assert given == ([] if kind == 'tpu' else [f'--processes={hosts}'])
  environment = environment_of(container, labels)
  assert kind == 'tpu' or environment == {'JOBSET_NAME': 'gpt2-774m', 'REPLICATED_JOB_NAME': 'node'}


def environment_of(container, labels):
  """What Kubernetes sets for a container whose pod has these labels."""
  values = {}
  for variable in container.get('env', []):
    match = re.fullmatch(r"metadata\.labels\['(.+)'\]", variable['valueFrom']['fieldRef']['fieldPath'])
    values[variable['name']] = labels[match[1]]
  return values


def resolved(args):
  """The config of a command line; the image holds the repository in /gptjax."""
  given = dict(arg.split('=', 1) for arg in args)
  recipe = configs.load(str(ROOT / given['--config'].removeprefix('/gptjax/')))
  return configs.override(recipe, {name.removeprefix('--config.'): int(value) for name, value in given.items() if '--config.' in name})


@pytest.mark.parametrize('kind', MANIFESTS)
def test_a_cluster_would_take_it(kind):
  check(kind, MANIFESTS[kind])


def check_sweep(text):
  """Raises for a Job that a cluster would refuse, or that ends before its sweep."""
  job = yaml.safe_load(text)
  kubernetes_validate.validate(job, KUBERNETES, strict=True)
  spec, pod = job['spec'], job['spec']['template']['spec']
  assert spec['completions'] == spec['parallelism'] and spec['completionMode'] == 'Indexed' and spec['backoffLimit'] > 0
  (container,) = pod['containers']
  assert pod['restartPolicy'] == 'Never' and {one['name'] for one in container['volumeMounts']} == {one['name'] for one in pod['volumes']}
  assert [(rule['action'], rule['onExitCodes']['containerName'], rule['onExitCodes']['values'])
          for rule in spec['podFailurePolicy']['rules']] == [('FailJob', container['name'], [1, 2]), ('Ignore', container['name'], [75])]
  done = run_module(container['command'][2], *container['args'], only_parse=True)
  assert container['command'][:2] == ['python', '-m'] and done.returncode == 0, done.stderr


def test_a_cluster_would_take_the_job_of_a_sweep():
  check_sweep(SWEEP)


@pytest.mark.parametrize('right, wrong', [
  ('parallelism: 8', 'parallelism: 4'), ('backoffLimit: 100', 'backoffLimit: 0'), ('values: [1, 2]', 'values: [2]'),
  ('values: [75]', 'values: [57]'), ('completionMode: Indexed', 'completionMode: Any'), ('--out=', '--output='),
  ('restartPolicy: Never', 'restartPolicy: Always'), ('mountPath: /data', 'path: /data')])
def test_a_mistake_in_the_job_of_a_sweep_is_found(right, wrong):
  assert SWEEP.count(right) == 1
  with pytest.raises((AssertionError, KeyError, kubernetes_validate.ValidationError)):
    check_sweep(SWEEP.replace(right, wrong))


@pytest.mark.parametrize(('kind', 'right', 'wrong'), [
  ('tpu', 'parallelism: 64', 'parallelism: 63'),
  ('tpu', 'completions: 64', 'completions: 65'),
  ('tpu', 'google.com/tpu: 4', 'google.com/tpu: 8'),
  ('tpu', 'topology: 16x16', 'topology: 8x16'),
  ('tpu', 'replicas: 2', 'replicas: 3'),
  ('tpu', 'mesh.replica=2', 'mesh.replica=1'),
  ('tpu', 'microbatches=2', 'microbatches=4'),
  ('tpu', 'nodeSelector:', 'nodeSelektor:'),
  ('tpu', 'backoffLimit: 0', 'backoffLimit: none'),
  ('tpu', 'maxRestarts: 100', 'maxRestart: 100'),
  ('tpu', 'enableDNSHostnames: true', 'enableDNSHostnames: false'),
  ('tpu', 'restartPolicy: Never', 'restartPolicy: Sometimes'),
  ('tpu', 'v1alpha2', 'v1'),
  ('gpu', '--processes=4', '--processes=8'),
  ('gpu', 'k8s.io/jobset-name', 'k8s.io/jobset'),
  ('gpu', 'name: REPLICATED_JOB_NAME', 'name: JOB_NAME'),
  ('gpu', 'nvidia.com/gpu: 8', 'nvidia.com/gpu: 4'),
  ('gpu', 'name: gpt2-774m', 'name: gpt2_774m'),
  ('gpu', 'mountPath: /dev/shm', 'path: /dev/shm'),
  ('gpu', 'values: [2]', 'values: [3]'),
  ('tpu', 'values: [75]', 'values: [57]'),
])
def test_a_mistake_is_found(kind, right, wrong):
  assert MANIFESTS[kind].count(right) == 1
  with pytest.raises((AssertionError, KeyError, kubernetes_validate.ValidationError)):
    check(kind, MANIFESTS[kind].replace(right, wrong))


@pytest.mark.parametrize('kind', MANIFESTS)
def test_the_command_is_one(kind):
  container, args = container_of(kind)
  assert container['command'][:2] == ['python', '-m']
  args = [arg.replace('/gptjax/', f'{ROOT}/') for arg in args]
  done = run_module(*container['command'][2:], *args, '--print_config')
  assert done.returncode == 0, done.stderr


def test_gpu_pods_find_each_other():
  from gptjax.distributed import discover

  container, args = container_of('gpu')
  labels = {'jobset.sigs.k8s.io/jobset-name': 'gpt2-774m', 'jobset.sigs.k8s.io/replicatedjob-name': 'node'}
  group = discover(processes=4, environment=environment_of(container, labels) | {'JOB_COMPLETION_INDEX': '3'}, metadata=lambda name: None)
  assert (group.count, group.index) == (4, 3) and '--processes=4' in args
  port = container['ports'][0]['containerPort']
  assert group.coordinator == f'gpt2-774m-node-0-0.gpt2-774m:{port}'


def container_of(kind):
  """(the container, its arguments) of a manifest."""
  (job,) = yaml.safe_load(MANIFESTS[kind])['spec']['replicatedJobs']
  (container,) = job['template']['spec']['template']['spec']['containers']
  return container, container['args']
