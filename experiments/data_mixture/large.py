"""The same mixtures for a model of 124 million parameters and 2.5 billion tokens, from stores that you make with GPT-2's tokenizer.

python -m gptjax.sweep --sweep=experiments/data_mixture/large.py --out=sweeps/data_mixture_large
"""

from experiments.data_mixture.sweep import points, valid
from gptjax.sweeps import Sweep

STORES = 'stores/mixture_large'


def get_sweep() -> Sweep:
  return Sweep('configs/gpt2_124m.py', points(STORES),
               overrides={'steps': '2.5e9 tokens', 'optimizer.warmup': 500, 'data.isolate_documents': True, 'data.valid': valid(STORES)})
