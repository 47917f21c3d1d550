"""A block of your own: attention and feed-forward layer side by side, as in GPT-J and PaLM (arXiv:2204.02311, section 2).

  python -m gptjax.train --config=examples/own_block.py --workdir=runs/own_block
  python -m gptjax.generate --workdir=runs/own_block --prompt='def '
"""

import gptjax
from gptjax.model import Block


class ParallelBlock(Block):
  """x + attention(norm(x)) + mlp(norm(x)), with one norm."""

  def __init__(self, config, compute, stack=(), experts=False):
    super().__init__(config, compute, stack, experts)
    del self.mlp_norm  # the parts that are used are attention_norm, attention and mlp

  def __call__(self, x, layer, positions, cache, keys, rows):
    """Returns the residual stream after the layer, its part of the cache, and sums that it adds to the loss or to what is logged.

    Args:
      x: residual stream [B * T, D].
      layer: number of the layer, from 0.
      positions: positions of the tokens, and what they may attend to.
      cache: keys and values of earlier tokens in generation, else None.
      keys: for dropout, which this block has not.
      rows: mesh axis that splits tokens between products, which modules get as it is.
    """
    y = self.attention_norm(x)
    attended, cache = self.attention(y, layer, positions, cache, None, rows)
    return x + attended + self.mlp(y, rows), cache, {}


def get_config():
  return gptjax.load_config('configs/experiment.py', {'model.block': 'examples.own_block:ParallelBlock'})
