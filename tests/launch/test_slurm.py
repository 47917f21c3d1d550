"""tools/launch/slurm.sbatch on a real Slurm: two virtual nodes of two pretended GPUs each, on loopback."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/launch/slurm.sbatch'
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol')
NODES = '127.0.0.[1-2]'
"""Names that are addresses: a process finds its peers by the names of their nodes."""

PROBE = '''
import json, os, pathlib, sys
workdir = pathlib.Path(sys.argv[-1].removeprefix('--workdir='))
(workdir / f'{os.environ["SLURM_PROCID"]}.json').write_text(json.dumps({'argv': sys.argv[1:], 'environment': dict(os.environ)}))
print('process', os.environ['SLURM_PROCID'], 'restart', os.environ.get('SLURM_RESTART_COUNT', 0), flush=True)
'''
SLEEP = PROBE + '''
import signal, time
def save(*_):
  (workdir / f'saved-{os.environ["SLURM_PROCID"]}').touch()
  sys.exit(75)
if 'SLURM_RESTART_COUNT' not in os.environ:
  signal.signal(signal.SIGTERM, save)
  (workdir / f'{os.environ["SLURM_PROCID"]}.waits').touch()
  time.sleep(300)
'''
FAIL = PROBE + '''
import time
if os.environ['SLURM_PROCID'] == '1':
  sys.exit(3)
time.sleep(300)
'''
HERE = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'

pytestmark = [
  pytest.mark.skipif(os.getuid() != 0, reason='only root may start a Slurm of its own'),
  pytest.mark.skipif(not all(shutil.which(name, path=HERE) for name in PROGRAMS),
                     reason='needs Slurm: apt-get install slurm-wlm munge'),
]


class Cluster:
  """A Slurm with its own key, ports and folder; it knows nothing of another one on this machine."""

  def __init__(self, folder):
    self.folder, self.started = folder, []
    self.environment = {**os.environ, 'PATH': HERE, 'SLURM_CONF': str(folder / 'slurm.conf')}

  def start(self):
    here, name = self.folder, socket.gethostname()
    (here / 'key').write_bytes(os.urandom(128))
    (here / 'key').chmod(0o600)
    (here / 'state').mkdir()
    ports = _free_ports(3)
    (here / 'gres.conf').write_text('AutoDetect=off\nName=gpu File=/dev/null\nName=gpu File=/dev/zero\n')
    (here / 'slurm.conf').write_text('\n'.join((
      'ClusterName=loopback', f'SlurmctldHost={name}(127.0.0.1)', f'SlurmctldPort={ports[0]}', 'SlurmUser=root', 'SlurmdUser=root',
      'AuthType=auth/munge', f'AuthInfo=socket={here}/munge', f'StateSaveLocation={here}/state',
      f'SlurmdSpoolDir={here}/spool-%n', f'SlurmctldPidFile={here}/slurmctld.pid', f'SlurmdPidFile={here}/slurmd-%n.pid',
      f'SlurmctldLogFile={here}/slurmctld.log', f'SlurmdLogFile={here}/slurmd-%n.log',
      'ProctrackType=proctrack/linuxproc', 'TaskPlugin=task/none', 'SelectType=select/cons_tres', 'SelectTypeParameters=CR_Core',
      'ReturnToService=2', 'SlurmdParameters=config_overrides', 'GresTypes=gpu',
      f'NodeName={NODES} NodeHostname={name} Port={ports[1]},{ports[2]} CPUs=4 Gres=gpu:2',
      'PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP')) + '\n')
    self._start('munged', '--foreground', '--force', f'--key-file={here}/key', f'--socket={here}/munge', f'--pid-file={here}/munge.pid',
                f'--seed-file={here}/seed', f'--log-file={here}/munge.log')
    self.until(lambda: (here / 'munge').exists())
    self._start('slurmctld', '-D')
    for node in ('127.0.0.1', '127.0.0.2'):
      self._start('slurmd', '-D', '-N', node)
    self.until(lambda: self.ask('sinfo', '--noheader', '--format=%D %T', check=False).strip() == '2 idle')

  def stop(self):
    if len(self.started) > 1:
      self.ask('scancel', '--user=root', check=False)
      self.until(lambda: not self.ask('squeue', '--noheader', check=False).strip(), check=False)
    for process in reversed(self.started):
      process.terminate()
      try:
        process.wait(10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

  def ask(self, *command, check=True, cwd=None, **environment):
    """What a client of Slurm prints."""
    done = subprocess.run(command, env=self.environment | environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, f'{command}\n{done.stderr}'
    return done.stdout

  def submit(self, workdir, *command, **environment):
    """Submits the script on both nodes, from the workdir's parent; returns the job's number."""
    options = ('--parsable', '--nodes=2', '--gpus-per-node=2', f'--output={workdir}.out', f'--chdir={ROOT}')
    return self.ask('sbatch', *options, SCRIPT, workdir, *command, **environment).strip()

  def job(self, number):
    """State and exit code of a job."""
    facts = dict(one.split('=', 1) for one in self.ask('scontrol', 'show', 'job', '--oneliner', number).split() if '=' in one)
    return facts['JobState'], facts['ExitCode']

  def wait_for(self, number, *states, seconds=60.0):
    self.until(lambda: self.job(number)[0] in states, seconds=seconds)
    return self.job(number)

  def _start(self, *command):
    with (self.folder / f'output-{len(self.started)}').open('w') as output:
      self.started.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT))

  def until(self, condition, *, seconds=60.0, check=True):
    deadline = time.monotonic() + seconds
    while not condition():
      if time.monotonic() > deadline:
        logs = '\n'.join(f'{log.name}:\n{log.read_text()[-2000:]}' for log in sorted(self.folder.glob('output-*')))
        assert not check, f'waited {seconds:.0f} s for Slurm\n{logs}'
        return
      time.sleep(0.1)


def _free_ports(count):
  sockets = [socket.socket() for _ in range(count)]
  try:
    for one in sockets:
      one.bind(('127.0.0.1', 0))
    return [one.getsockname()[1] for one in sockets]
  finally:
    for one in sockets:
      one.close()


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  cluster = Cluster(tmp_path_factory.mktemp('slurm'))
  try:
    cluster.start()
    yield cluster
  finally:
    cluster.stop()


@pytest.fixture
def probe(tmp_path):
  """A function from a program's text to the command that runs it."""
  def command(text):
    (tmp_path / 'probe.py').write_text(text)
    return sys.executable, str(tmp_path / 'probe.py')
  return command


@pytest.mark.full
def test_every_task_learns_who_and_where_it_is(cluster, tmp_path, probe):
  workdir = tmp_path / 'run'
  number = cluster.submit(workdir, *probe(PROBE), '--flag=two words', SLURM_MEM_PER_CPU='1', SLURM_MEM_PER_NODE='1')
  assert cluster.wait_for(number, 'COMPLETED', 'FAILED') == ('COMPLETED', '0:0'), Path(f'{workdir}.out').read_text()
  for process, node in enumerate(('127.0.0.1', '127.0.0.2')):
    told = json.loads((workdir / f'{process}.json').read_text())
    assert told['argv'] == ['--flag=two words', f'--workdir={workdir}']
    expected = {
      'SLURM_PROCID': str(process), 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NODELIST': NODES,
      'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_JOB_ID': number, 'SLURMD_NODENAME': node, 'CUDA_VISIBLE_DEVICES': '0,1',
      'no_grpc_proxy': '127.0.0.1,127.0.0.2', 'PYTHONNOUSERSITE': '1'}
    assert {name: told['environment'].get(name) for name in expected} == expected
    assert (workdir / f'logs/{number}-{process}.log').read_text() == f'process {process} restart 0\n'
  assert f'job {number}, restart 0, 2 nodes: {NODES}' in Path(f'{workdir}.out').read_text()


@pytest.mark.full
def test_a_job_that_runs_out_of_time_is_queued_again(cluster, tmp_path, probe):
  workdir = tmp_path / 'run'
  number = cluster.submit(workdir, *probe(SLEEP))
  cluster.until(lambda: len(list(workdir.glob('?.waits'))) == 2)
  cluster.ask('scancel', '--batch', '--signal=USR1', number)  # as Slurm does at --signal=B:USR1@120
  cluster.wait_for(number, 'PENDING')
  assert list(workdir.glob('saved-*'))  # one that ends first takes the others with it, which would have saved the same
  cluster.ask('scontrol', 'update', f'JobId={number}', 'StartTime=now')  # a job that is queued again waits for two minutes
  assert cluster.wait_for(number, 'COMPLETED', 'FAILED') == ('COMPLETED', '0:0')
  text = Path(f'{workdir}.out').read_text()
  assert 'out of time' in text and 'restart 0' in text and 'restart 1' in text
  for process in range(2):
    log = (workdir / f'logs/{number}-{process}.log').read_text()
    assert f'process {process} restart 0\n' in log and log.endswith(f'process {process} restart 1\n')


@pytest.mark.full
def test_a_task_that_fails_ends_the_others_and_the_job(cluster, tmp_path, probe):
  number = cluster.submit(tmp_path / 'run', *probe(FAIL))
  assert cluster.wait_for(number, 'COMPLETED', 'FAILED', seconds=30)[0] == 'FAILED'
  assert 'task 1: Exited with exit code 3' in (tmp_path / 'run.out').read_text()


TRIAL = """
import json, pathlib, signal, sys, time
flags = dict(one.lstrip('-').partition('=')[::2] for one in sys.argv[1:])
file = pathlib.Path(flags['workdir']) / 'metrics.jsonl'
steps = len(file.read_text().splitlines()) if file.exists() else 0
ends = []
signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
for step in range(steps + 1, 11):
  with file.open('a') as out:
    out.write(json.dumps({'step': step, 'loss': 1 / step}) + '\\n')
  time.sleep(0.1)
  if ends:
    sys.exit(75)
"""


@pytest.mark.full
def test_the_tasks_of_an_array_share_the_trials_of_a_sweep(cluster, tmp_path):
  (tmp_path / 'trial.py').write_text(TRIAL)
  (tmp_path / 'sweep.py').write_text('from gptjax.sweeps import Sweep, seeds\n'
                                     'def get_sweep():\n  return Sweep("configs/default.py", seeds(24), metric="loss")\n')
  (tmp_path / 'program.py').write_text('import sys\nsys.orig_argv[1:] = ["-m", "gptjax.sweep"]\nfrom gptjax.sweeps import worker\n'
                                       'worker.PROGRAM = (sys.argv.pop(1),)\nfrom gptjax import sweep\nsweep.script()')
  number = cluster.ask(
    'sbatch', '--parsable', '--array=0-5', f'--output={tmp_path}/%a.out', f'--chdir={ROOT}', ROOT / 'tools/launch/sweep.sbatch',
    sys.executable, tmp_path / 'program.py', tmp_path / 'trial.py', f'--sweep={tmp_path}/sweep.py', f'--out={tmp_path}/out',
    '--heartbeat=1', PYTHONPATH=str(ROOT)).strip()
  trials = tmp_path / 'out' / 'trials'
  cluster.until(lambda: trials.exists() and len(list(trials.glob('*/metrics.jsonl'))) >= 6)
  first = cluster.ask('squeue', '--noheader', '--format=%A', f'--job={number}_0').strip()
  # As before its time limit. scancel signals tasks of arrays, but waits for more.
  cluster.ask('timeout', '2', 'scancel', '--batch', '--signal=USR1', first, check=False)
  cluster.until(lambda: 'requeued' in (tmp_path / '0.out').read_text())
  cluster.ask('scontrol', 'update', f'JobId={first}', 'StartTime=now')
  cluster.until(lambda: not cluster.ask('squeue', '--noheader', f'--job={number}', check=False).strip(), seconds=120)
  logs = '\n'.join(file.read_text() for file in sorted(tmp_path.glob('?.out')))
  with (tmp_path / 'out' / 'trials.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 24 and {(row['status'], row['step'], row['loss']) for row in rows} == {('done', '10', '0.1')}, logs
  assert all(len((trials / row['trial'] / 'metrics.jsonl').read_text().splitlines()) == 10 for row in rows)
  assert sum(line.startswith('done ') for line in logs.splitlines()) == 24


@pytest.mark.full
def test_training_meets_over_the_nodes(cluster, tmp_path):
  workdir, text = tmp_path / 'run', tmp_path / 'text.txt'
  text.write_text('a lazy dog and the quick brown fox jump over old warm stoves while small cats sleep.\n' * 100)
  flags = [f'--config.{name}={value}' for name, value in {
    'data.source.path': text, 'data.tokenizer.kind': 'chars', 'data.context': 16, 'model.layers': 1, 'model.heads': 2, 'model.width': 16,
    'eval.rows': 4, 'eval.sample_tokens': 0, 'steps': 4, 'optimizer.warmup': 1, 'batch_size': 4, 'mesh.data': 2, 'zero_stage': 3}.items()]
  command = (sys.executable, '-m', 'gptjax.train', '--config=configs/default.py', '--cpu_devices=1', f'--cache_dir={tmp_path}/cache')
  number = cluster.submit(workdir, *command, *flags, http_proxy='http://127.0.0.1:9')
  state = cluster.wait_for(number, 'COMPLETED', 'FAILED', seconds=240)
  logs = '\n'.join(log.read_text() for log in sorted((workdir / 'logs').iterdir()))
  assert state == ('COMPLETED', '0:0'), logs
  assert json.loads((workdir / 'run.json').read_text())['processes'].startswith('2, Slurm step')
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert max(steps) == 4


def test_arguments_are_asked_for():
  done = subprocess.run(['bash', SCRIPT, 'runs/first'], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith('usage: sbatch')
