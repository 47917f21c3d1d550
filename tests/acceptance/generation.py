"""Bars of generation: what a cache decodes against full forward passes, and speed beside transformers."""

import json
from pathlib import Path

from tests.acceptance.record import Result, bar, python, timed


@bar
def decoding(folder: Path) -> Result:
  found = json.loads(python('tests.acceptance.decoded').stdout.splitlines()[-1])
  worst = max(one['logits'] for one in found.values())
  different = [name for name, one in found.items() if one['different']]
  return Result(
    'every family, two shapes, float32: 64 tokens of 5 unequal prompts with a cache against full forward passes: the same greedy '
    'tokens, logits within 1e-4', f'{len(found)} models, {sum(one["tokens"] for one in found.values()):,} tokens, worst logit off by '
    f'{worst:.1e}; other tokens: {", ".join(different) or "none"}', worst <= 1e-4 and not different, 'python -m tests.acceptance.decoded')


@bar
def generation_speed(folder: Path) -> Result:
  results = timed('generate_1', 'generate_8')
  told = [f'{r["name"].removeprefix("generate_")} prompts {r["ratio"]:.2f} ({r["lowest"]:.2f} to {r["highest"]:.2f}; '
          + ', '.join(f'{name} {1e3 * cost["cpu"]:.1f}' for name, cost in r['costs'].items()) + ' CPU-ms per token)' for r in results]
  return Result("GPT-2 small's shape, 128 new tokens: transformers' CPU-seconds over ours, its fastest cache: at least 1.3 at 1 prompt, "
                '1.8 at 8', '; '.join(told), all(r['met'] for r in results), 'make bench')
