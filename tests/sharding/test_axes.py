"""A mesh axis is a row of one table: config, mesh, batches, the step, checks and plans know a new one without another change."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WITH_ANOTHER_AXIS = """
import json
import jax, numpy as np
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
from gptjax import config as configs
from gptjax.planning.volumes import theoretical
from gptjax.sharding import describe, make_mesh
from tiny import batch, put, trainer

def losses(mesh):
  with jax.set_mesh(make_mesh(mesh)):
    model = configs.ModelConfig(layers=1, width=16, heads=2, vocab_size=50, dropout=0.1)
    state, step = trainer(model, zero_stage=2, microbatches=2)
    found = []
    for _ in range(2):
      state, metrics = step(state, put(batch(8)))
      found.append(float(metrics['loss']))
    return found

mesh = configs.MeshConfig(data=2, island=2)
try:
  configs.override(configs.Config(), {'mesh.islnd': 2})
except configs.UserError as error:
  message = str(error)
config = configs.Config(model=configs.ModelConfig(vocab_size=50), mesh=mesh, zero_stage=2)
sent = {axis for one in theoretical(config, mesh.sizes) for axis in one.axes}
print(json.dumps({'one': losses(configs.MeshConfig(data=1)), 'four': losses(mesh), 'mesh': describe(make_mesh(mesh)),
                  'message': message, 'sent': sorted(sent), 'help': configs.docstrings(configs.MeshConfig)['island']}))
"""


def test_a_new_axis_is_one_row_of_the_table(tmp_path):
  shutil.copytree(ROOT / 'gptjax', tmp_path / 'gptjax')  # with __pycache__: to compile all modules takes a second
  table = tmp_path / 'gptjax/config/mesh.py'
  row = "\n  MeshAxis('island', 1, 'islands of devices', batch=True, crosses_slices=True),"
  table.write_text(table.read_text().replace('AXES = (', f'AXES = ({row}', 1))
  done = subprocess.run([sys.executable, '-c', WITH_ANOTHER_AXIS], cwd=tmp_path, capture_output=True, text=True,
                        env=os.environ | {'PYTHONPATH': str(ROOT / 'tests')})
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert all(abs(a / b - 1) < 1e-5 for a, b in zip(found['one'], found['four'], strict=True)), found
  assert found['mesh'] == 'island 2 x data 2 x model 1' and found['sent'] == ['data', 'island'] and found['help'] == 'islands of devices'
  assert 'mesh.island' in found['message']


def test_few_files_name_an_axis_literally():
  # 'data' and 'model' alone are names of other things, too: folders and fields of a config.
  literal = re.compile(r"'replica'|\bmesh\.(replica|data|model)\b|MeshConfig\((replica|data|model)=|(shape|sizes)\['(data|model)'\]")
  named = [path for folder in ('gptjax', 'tools') for path in (ROOT / folder).rglob('*.py') if literal.search(path.read_text())]
  assert len(named) <= 6, named
