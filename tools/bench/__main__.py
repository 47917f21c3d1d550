"""Measures gptjax beside torch and transformers on this machine's CPU: python -m tools.bench [--only=NAME,...] [--out=FILE.md]

Needs requirements-parity.txt. See `contest.py` for how it is measured.
"""

import datetime
import json
from importlib import metadata
from pathlib import Path

from absl import flags

from gptjax import config as configs
from . import generation, step
from .contest import OURS, Contest, compare, serve
from .machine import machine

CONTESTS: dict[str, tuple[str, Contest]] = {
  **{name: ('training', step.contest(shape)) for name, shape in step.SHAPES.items()},
  **{f'generate_{count}': ('generation', generation.contest(count)) for count in generation.BARS},
}
"""By name: the table it belongs to, and the contest."""

TITLES = {
  'training': '## A training step\n\nfloat32, AdamW and clipping included, the same batches; per step.',
  'generation': f"## Generation\n\nGPT-2 small's shape, random weights, float32, greedy, {generation.NEW} new tokens per prompt; per token "
                'of all prompts.\nCompiling comes before.',
}
_WHAT = {'training': 'layers / width / context / batch / vocabulary', 'generation': 'prompts'}

_ROUNDS = flags.DEFINE_integer('rounds', 7, 'alternating rounds of each implementation', lower_bound=1)
_ONLY = flags.DEFINE_list('only', list(CONTESTS), f'what to measure: {", ".join(CONTESTS)}')
_OUT = flags.DEFINE_string('out', '', 'Markdown file to write the tables to; empty: only print them')
_WORKER = flags.DEFINE_string('worker', '', 'internal: the implementation that this process runs')


def table(kind: str, results: list[dict]) -> str:
  """Results of one kind as Markdown."""
  implementations = list(results[0]['costs'])
  lines = [f'| {_WHAT[kind]} | {" | ".join(implementations)} | ratio (lowest to highest round) | bar |',
           f'|{" --- |" * (len(implementations) + 3)}']
  for result in results:
    costs = ' | '.join(f'{1e3 * cost["cpu"]:,.1f} ms; {1e3 * cost["wall"]:,.1f} ms; {cost["faults"]:,.0f}'
                       for cost in result['costs'].values())
    lines.append(f'| {CONTESTS[result["name"]][1].work} | {costs} | {result["ratio"]:.2f} ({result["lowest"]:.2f} to '
                 f'{result["highest"]:.2f}) | at least {result["bar"]:.2f}, {"met" if result["met"] else "not met"} |')
  return '\n'.join(lines)


def page(results: list[dict], rounds: int) -> str:
  """docs/bench.md."""
  parts = ['# Speed', f'Beside torch on a CPU; medians over {rounds} alternating rounds, each implementation in a process of its own. '
           '`make bench` wrote this.', f"""\
A cell: CPU time (user + system, all threads); wall time, which other work on the machine lengthens;
page faults. The ratio is the faster rival's CPU time to {OURS}'s. A training step of {OURS} must cause fewer than
{step.MOST_FAULTS:,} page faults."""]
  for kind, title in TITLES.items():
    if chosen := [result for result in results if CONTESTS[result['name']][0] == kind]:
      parts += [title, table(kind, chosen)]
  return '\n\n'.join([*parts, f'{datetime.date.today()}, {machine()}']) + '\n'


def main(_) -> None:
  for name in _ONLY.value:
    if name not in CONTESTS:
      raise configs.UserError('--only', name, ', '.join(CONTESTS), list(CONTESTS))
  if _WORKER.value:
    serve(CONTESTS[_ONLY.value[0]][1], _WORKER.value)
    return
  for package in ('torch', 'transformers'):
    try:
      metadata.version(package)
    except metadata.PackageNotFoundError:
      raise configs.UserError(package, None, 'pip install -r requirements-parity.txt') from None
  Path(_OUT.value or '.').parent.mkdir(exist_ok=True)  # not after minutes of measuring
  results = []
  for name in _ONLY.value:
    results.append(compare(name, CONTESTS[name][1], _ROUNDS.value))
    print(json.dumps(results[-1]), flush=True)
  written = page(results, _ROUNDS.value)
  print(written)
  if _OUT.value:
    Path(_OUT.value).write_text(written)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
