"""Bars of interop: every family through a run and back, memory at full size, and folders that must be refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gptjax.config import ComputeConfig
from gptjax.interop import FAMILIES, Fields
from gptjax.interop.matching import bits, match
from gptjax.interop.tensor_files import DTYPES, Entry, Writer, read_tensors
from gptjax.model import abstract_model
from tests.acceptance import readings
from tests.acceptance.record import Result, bar, given, python

_DECODER = {'vocab_size': 50261, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
            'num_key_value_heads': 2, 'max_position_embeddings': 64, 'head_dim': 8}
_GPT2 = {'vocab_size': 50257, 'n_positions': 64, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
_XL: dict[str, Any] = {'vocab_size': 50257, 'n_positions': 1024, 'n_embd': 1600, 'n_layer': 48, 'n_head': 25}


def make_folder(folder: Path, family: str, fields: dict[str, Any], dtype: str = 'F32', shard_bytes: int = 2_000_000_000) -> Path:
  """Writes a folder of a family with random values, and GPT-2's tokenizer; a tensor at a time."""
  kind = FAMILIES[family]
  values = {'architectures': [kind.architecture], 'model_type': family, **fields}
  model, context = kind.read(Fields(values))
  matched = match(kind, abstract_model(model, ComputeConfig(), context), context)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(values | {'transformers_version': '4.40.0', 'something': [1, None]}))
  for name in ('encoder.json', 'vocab.bpe'):
    shutil.copy(given('gpt2_bpe') / name, folder)
  writer = Writer(folder, {tensor.name: Entry(dtype, matched.shape(tensor)) for tensor in matched.tensors}, shard_bytes)
  rng = np.random.default_rng(0)
  for tensor in matched.tensors:
    mean = tensor.parameters[0].endswith('gain') and model.norm != 'rmsnorm1p'
    value = 0.05 * rng.standard_normal(matched.shape(tensor), np.float32) + mean
    writer.write(tensor.name, value.astype(DTYPES[dtype]))
  writer.finish()
  return folder


def same_tensors(one: Path, other: Path) -> bool:
  """Whether two folders have the same tensors bit by bit."""
  ours, theirs = read_tensors(one), read_tensors(other)
  return ours.keys() == theirs.keys() and all(
    (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
    and np.array_equal(bits(ours[name].view()), bits(theirs[name].view())) for name in ours)


@bar
def families(folder: Path) -> Result:
  done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-s', 'tests/parity/test_families.py', '-k', 'logits_and'],
                        stdout=subprocess.PIPE, text=True)
  found = re.findall(r'worst of (\w+): logits (\S+), gradients (\S+)\n', done.stdout)
  logits, gradients = (max(float(one[at]) for one in found) for at in (1, 2))
  return Result(
    'every family, random weights, two shapes or three, grouped queries or not, tied and untied, scanned or not, 3 lengths, float32: '
    'logits within 1e-4 of transformers, gradients within 1e-3 relative',
    f'{len(found)} models of {len({name for name, *_ in found})} families; logits '
    f'{logits:.1e}, gradients {gradients:.1e}', done.returncode == 0 and {name for name, *_ in found} == set(FAMILIES),
    'pytest tests/parity/test_families.py')


@bar
def families_roundtrip(folder: Path) -> Result:
  both = [{}, {'num_key_value_heads': 4, 'tie_word_embeddings': True, 'num_hidden_layers': 7}]
  shapes: dict[str, list[dict[str, Any]]] = {'gpt2': [_GPT2, _GPT2 | {'n_embd': 24, 'n_layer': 3, 'n_inner': 40}]} | {
    name: [_DECODER | change for change in both] for name in FAMILIES if name != 'gpt2'}
  wrong, worst, count = [], 0.0, 0
  for name, cases in shapes.items():
    for fields, (dtype, *flags) in zip(cases, (('F32',), ('BF16', '--scan'))):
      count += 1
      source = make_folder(folder / f'in{count}', name, fields, dtype, 2_000_000)
      for module, flag, target in (('import_hf', '--folder', source), ('export_hf', '--folder', folder / f'out{count}')):
        printed = python(f'tools.{module}', f'{flag}={target}', f'--workdir={folder}/run{count}', '--check=transformers',
                         *(flags if module == 'import_hf' else ['--shard_gb=0.002'])).stdout
        worst = max(worst, float(printed.split('largest difference of logits ')[1].split()[0]))
      if not same_tensors(source, folder / f'out{count}') or json.loads((source / 'config.json').read_text()) != json.loads(
          (folder / f'out{count}' / 'config.json').read_text()):
        wrong.append(f'{name} {fields}')
  return Result('every family, two shapes (float32; bfloat16, tied and scanned): after import and export tensors are bit for bit the same, '
                'config.json too; logits within 1e-3 of transformers', f'{count - len(wrong)} of {count} the same; worst logit off by '
                f'{worst:.1e}' + ''.join(f'; wrong: {one}' for one in wrong), not wrong and worst <= 1e-3,
                'python -m tools.import_hf --folder=IN --workdir=RUN; python -m tools.export_hf --workdir=RUN --folder=OUT')


@bar
def misreadings(folder: Path) -> Result:
  done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-s', 'tests/parity/test_comparison.py'], stdout=subprocess.PIPE, text=True)
  found = [int(count) for count in re.findall(r'noticed of \w+: (\d+)', done.stdout)]
  return Result('40 or more misread settings (theta, factor, window, kinds of layers, caps, scales, norms, ties): the import fails for '
                'each, and passes for the right ones', f'{sum(found)} misreadings of {len(found)} families noticed',
                done.returncode == 0 and sum(found) >= 40, 'pytest tests/parity/test_comparison.py')


def transformers_4(folder: Path) -> Path:
  """Installs transformers 4 into a folder, which PYTHONPATH puts before the environment's own."""
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', f'--target={folder}', 'transformers==4.57.1',
                  'tokenizers==0.22.1', 'huggingface_hub==0.36.0'], check=True)
  return folder


@bar
def config_readings(folder: Path) -> Result:
  given_values = readings.cases({name: family.architecture for name, family in FAMILIES.items() if name != 'gpt2'}, 210)
  given_values += [values for name in FAMILIES if name != 'gpt2' for values in readings.written(name)]
  (folder / 'configs.json').write_text(json.dumps(given_values))
  theirs = []
  for path in ('', str(transformers_4(folder / 'v4'))):
    python('tests.acceptance.readings', f'{folder}/configs.json', f'{folder}/read.json', PYTHONPATH=path)
    theirs.append(json.loads((folder / 'read.json').read_text()))
  equal, refused, wrong = 0, 0, list[str]()
  for values, new, old in zip(given_values, *theirs):
    ours = readings.our_reading(values)
    refuses = isinstance(ours, str) and ours.startswith('config.json: ')
    agrees = readings.same(ours, new) and (isinstance(old, str) or readings.newer(values) or readings.same(ours, old))
    refused, equal = refused + refuses, equal + agrees
    if not refuses and not agrees:
      wrong.append(f'{values}: {ours}')
  return Result('config.json of 7 families with settings of RoPE and windows in several spellings and places, and exported ones: the '
                'frequencies and windows of transformers 5 and 4.57 to 1e-6, or one error that names the field',
                f'{len(given_values)} configs: {equal} equal, {refused} refused, {len(wrong)} wrong' + ''.join(f'; {one}' for one in wrong),
                not wrong, 'python -m tests.acceptance --only=config_readings')


def peak(*args: str) -> float:
  """Runs a module; the most memory it had at once, in bytes."""
  process = subprocess.Popen([sys.executable, '-m', *args], stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f'{" ".join(args)} ended with status {status}')
  return usage.ru_maxrss * 1024


@bar
def import_memory(folder: Path) -> Result:
  figures, met = [], True
  for dtype, flags in (('F32', ()), ('BF16', ('--scan',))):
    source = make_folder(folder / 'in', 'gpt2', _XL, dtype)
    model = sum(4 * entry.bytes // DTYPES[dtype].itemsize for entry in read_tensors(source).values())
    takes = peak('tools.import_hf', f'--folder={source}', f'--workdir={folder}/run', '--check=roundtrip', *flags)
    gives = peak('tools.export_hf', f'--workdir={folder}/run', f'--folder={folder}/out', '--check=roundtrip', '--shard_gb=2')
    same = same_tensors(source, folder / 'out')
    figures.append(f'{dtype}{" stacked" * bool(flags)}: import {takes / 1e9:.2f}, export {gives / 1e9:.2f} GB, model {model / 1e9:.2f}, '
                   f'tensors {"the same" if same else "DIFFERENT"}')
    met = met and same and max(takes, gives) <= model + 1e9
    for name in ('in', 'run', 'out'):
      shutil.rmtree(folder / name)
  return Result('GPT-2 XL (1.56 billion parameters) in and out: peak memory at most the model in float32 and 1 GB', '; '.join(figures), met,
                'python -m tools.import_hf --folder=GPT2_XL --workdir=RUN --check=roundtrip')


def _rewritten(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
  """Rewrites a folder's tensors, changed."""
  values = {name: np.array(entry.view()) for name, entry in read_tensors(folder).items()}
  change(values)
  (folder / 'model.safetensors').unlink()
  save_file(values, folder / 'model.safetensors')


_LAST = 'transformer.h.1.mlp.c_fc.weight'


def _corrupt(folder: Path, name: str) -> tuple[str, ...]:
  """Corrupts an intact folder in a named way; returns the flags of the import."""
  file = folder / 'model.safetensors'
  whole = file.read_bytes() if file.exists() else b''
  match name:
    case 'missing tensor':
      _rewritten(folder, lambda values: values.pop(_LAST))
    case 'extra tensor':
      _rewritten(folder, lambda values: values.update({'transformer.h.2.ln_1.weight': np.ones(32, np.float32)}))
    case 'wrong shape':
      _rewritten(folder, lambda values: values.update({_LAST: values[_LAST].T.copy()}))
    case 'tied head that differs':
      _rewritten(folder, lambda values: values.update({'lm_head.weight': values['transformer.wte.weight'] + 1}))
    case 'unknown architecture':
      values = json.loads((folder / 'config.json').read_text())
      (folder / 'config.json').write_text(json.dumps(values | {'model_type': 'mamba', 'architectures': ['MambaForCausalLM']}))
    case 'truncated safetensors':
      file.write_bytes(whole[:-100])
    case 'corrupt header':
      file.write_bytes(whole[:8] + b'[' + whole[9:])
    case 'header longer than the file':
      file.write_bytes(b'\xff' * 8 + whole[8:])
    case 'overlapping tensors':
      file.write_bytes(whole.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1))
    case 'unknown type':
      file.write_bytes(whole.replace(b'"F32"', b'"F33"', 1))
    case 'context longer than the model':
      return ('--context=65',)
    case 'pickle only':
      file.rename(folder / 'pytorch_model.bin')
    case 'missing shard':
      next(folder.glob('model-00002-of-*')).unlink()
    case 'no tokenizer':
      (folder / 'encoder.json').unlink()
      (folder / 'vocab.bpe').unlink()
  return ()


_TOLD = {
  'missing tensor': _LAST, 'extra tensor': 'transformer.h.2.ln_1.weight', 'wrong shape': '[32, 128]',
  'tied head that differs': 'lm_head.weight',
  'unknown architecture': 'mamba', 'truncated safetensors': 'a complete safetensors file', 'corrupt header': 'a complete safetensors file',
  'header longer than the file': 'a complete safetensors file', 'overlapping tensors': 'a complete safetensors file', 'unknown type': 'F33',
  'context longer than the model': '--context', 'pickle only': 'only safetensors are read', 'missing shard': 'model-00002-of-',
  'no tokenizer': '--tokenizer'}


@bar
def bad_folders(folder: Path) -> Result:
  wrong = []
  for name, told in _TOLD.items():
    source = make_folder(folder / 'in', 'gpt2', _GPT2, shard_bytes=4_000_000 if name == 'missing shard' else 10**9)
    flags = _corrupt(source, name)
    done = subprocess.run([sys.executable, '-m', 'tools.import_hf', f'--folder={source}', f'--workdir={folder}/run', *flags],
                          capture_output=True, text=True)
    lines = done.stderr.splitlines()
    left = [path.name for path in folder.iterdir() if path.name != 'in']
    errors = [line for line in lines if line.startswith('error: ')]
    if done.returncode != 2 or errors != lines[-1:] or told not in errors[0] or 'Traceback' in done.stderr or left:
      wrong.append(f'{name}: {done.returncode} {done.stderr[-300:]!r} {left}')
    print(f'{name}: {lines[-1]}', file=sys.stderr)
    shutil.rmtree(source)
  return Result('corrupted or unsupported folders: one error line that names the fault, exit 2, no workdir',
                f'{len(_TOLD) - len(wrong)} of {len(_TOLD)}: ' + ', '.join(_TOLD) + ''.join(f'; wrong: {one}' for one in wrong), not wrong,
                'python -m tests.acceptance --only=bad_folders')
