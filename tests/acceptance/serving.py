"""Bars of the server: OpenAI's client, the harness through HTTP, load, and clients that behave badly."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from tests.acceptance.clients import bodies, disturb, load, serve
from tests.acceptance.evaluation import farthest, samples
from tests.acceptance.record import Result, bar, evaluate, given, python

CLIENTS = 8, 32
NEW = 128
PROMPTS = 32, 100, 256


def gpt2(folder: Path, **changes: int) -> Path:
  """A run with the tokenizer and, but for changes, the shape of GPT-2's smallest model, and random parameters."""
  import torch
  import transformers
  torch.manual_seed(0)
  transformers.GPT2LMHeadModel(transformers.GPT2Config(**changes)).save_pretrained(folder / 'hf')
  for file in given('gpt2_bpe').iterdir():
    shutil.copy(file, folder / 'hf')
  python('tools.import_hf', f'--folder={folder}/hf', f'--workdir={folder}/run')
  return folder / 'run'


@bar
def openai_client(folder: Path) -> Result:
  done = subprocess.run([sys.executable, '-m', 'pytest', '-m', 'full', 'tests/serving/test_openai_client.py', 'tests/serving/test_page.py'],
                        stdout=subprocess.PIPE, text=True)
  passed, others = (sum(map(int, re.findall(pattern, done.stdout))) for pattern in (r'(\d+) passed', r'(\d+) (?:failed|skipped|error)'))
  return Result("OpenAI's Python client in 60 cases: every route and field, streams, stop texts, characters split over tokens, errors, "
                'cancellation; and the page in Chromium at two widths', f'{passed} cases pass, {others} fail or are skipped',
                passed >= 60 and not others and not done.returncode, 'pytest -m full tests/serving')


@bar
def harness_over_http(folder: Path) -> Result:
  run, data = gpt2(folder, n_layer=2, n_embd=64, n_head=2), given('piqa/valid.jsonl').parents[1]
  python('tools.export_hf', f'--workdir={run}', f'--folder={folder}/exported')  # with a tokenizer that transformers reads
  put = ('--tasks=piqa', f'--task_data={data}', '--limit=100')
  evaluate(run, *put, '--sets=none', f'--samples={folder}/ours.jsonl')
  with serve(run, '--slots=4', '--name=run') as server:
    python('tests.acceptance.harness_client', f'--port={server.port}', f'--folder={folder}/exported', *put,
           f'--samples={folder}/theirs.jsonl')
  off, count, other = farthest(samples(folder / 'ours.jsonl'), samples(folder / 'theirs.jsonl'))
  return Result('the lm-evaluation-harness through its local-completions client: 200 log-likelihoods as in the same process, within 1e-5 '
                'nats', f'{count} log-likelihoods, largest difference {off:.1e}, {other} others greedy', count == 200 and off <= 1e-5
                and not other, 'python -m tests.acceptance.harness_client --port=PORT')


@bar
def server_load(folder: Path) -> Result:
  run = gpt2(folder)
  # Measured before and after each server, because the speed of a shared machine changes within minutes.
  bare = lambda *flags: json.loads(python('tests.acceptance.bare_loop', f'--workdir={run}', *flags).stdout.splitlines()[-1])
  told, met = [], True
  for clients in CLIENTS:
    measure = lambda: bare(f'--batches={clients}', '--prefills=')['rates'][str(clients)]
    rates = [measure()]
    with serve(run, f'--slots={clients}') as server:
      found, seconds = load(server.port, bodies(2 * clients, PROMPTS[0], NEW), clients)
      rate, compiled = sum(one.tokens for one in found) / seconds, server.compiled
    rates.append(measure())
    ratio = rate / statistics.mean(rates)
    told.append(f'{clients} clients {rate:.1f} tokens/s of {rates[0]:.1f} and {rates[1]:.1f} ({ratio:.2f}), {compiled} compiled')
    met &= ratio >= 0.85 and not compiled and len(found) == 2 * clients
  firsts = bare('--batches=')['firsts']
  with serve(run) as server:
    for length in PROMPTS:
      first = statistics.median(one.first for one in load(server.port, bodies(5, length, 4), 1)[0])
      ratio = first / firsts[str(length)]
      told.append(f'first token after {length}: {first:.3f} s of {firsts[str(length)]:.3f} ({ratio:.2f})')
      met &= ratio <= 1.3
  return Result(f"GPT-2 small's shape, prompts of {PROMPTS[0]} tokens, {NEW} new ones, 8 and 32 clients: output tokens per second at least "
                '0.85 of the bare decode loop, the time to the first token of a single client at most 1.3 of a bare prefill, nothing '
                'compiled after ready', '; '.join(told), met, 'python -m tests.acceptance --only=server_load')


@bar
def server_endurance(folder: Path) -> Result:
  with serve(gpt2(folder), '--slots=32') as server:
    load(server.port, bodies(200, PROMPTS[0], 4), 32)
    early = server.memory
    found, _ = load(server.port, bodies(1800, PROMPTS[0], 4, seed=1), 32)
    late = server.memory
    disturb(server.port, 500)
    found += load(server.port, bodies(32, PROMPTS[0], 4, seed=2), 32)[0]
    metrics, compiled = server.metrics(), server.compiled
  complete = sum(one.tokens == 4 for one in found)
  busy = metrics['gptjax_requests_running'] + metrics['gptjax_requests_waiting']
  cancelled = metrics['gptjax_requests_total{end="cancelled"}']
  return Result("GPT-2 small's shape: memory is flat (2 %) from 200 to 2,000 requests; after 500 clients that leave or send garbage 32 get "
                'all of theirs, and no slot is lost', f'{early / 2**20:,.0f} and {late / 2**20:,.0f} MiB; {complete:,} of {len(found):,} '
                f'complete, {cancelled:.0f} cancelled, {busy:.0f} slots or places taken at the end, {compiled} compiled',
                late <= 1.02 * early and complete == len(found) == 1832 and not busy and not compiled,
                'python -m tests.acceptance --only=server_endurance')
