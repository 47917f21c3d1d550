"""Counts of parameters, FLOPs and bytes: known figures, and others counted another way."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from tiers import full

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import abstract_model, attention_flops, flops_per_token, parameter_count, repeated_weights

SMALL = ModelConfig(layers=12, width=768, heads=12, vocab_size=50257, vocab_multiple=1)
"""GPT-2 small."""


def test_gpt2_small_has_its_published_count():
  assert parameter_count(SMALL, 1024) == 124_439_808
  assert parameter_count(dataclasses.replace(SMALL, bias=False), 1024) == 124_337_664


def test_an_untied_head_counts_once_more_and_rotary_positions_nothing():
  assert parameter_count(dataclasses.replace(SMALL, tied=False), 1024) == 124_439_808 + 50257 * 768
  assert parameter_count(dataclasses.replace(SMALL, positions='rope'), 1024) == 124_439_808 - 1024 * 768


@pytest.mark.parametrize('changes', [{}, {'bias': False}, {'tied': False}], ids=str)
def test_flops_of_gpt2_small_are_nanogpts(changes):
  # karpathy/nanoGPT, transformer_sizing.ipynb: forward and backward of one row, the full square of attention.
  assert flops_per_token(dataclasses.replace(SMALL, **changes), 1024, causal=False) * 1024 == 874_944_921_600


def flops(product) -> int:
  """FLOPs of one matrix product, by the shapes of its operands and result."""
  (contracted, _), _ = product.params['dimension_numbers']
  left = product.invars[0].aval.shape
  return 2 * math.prod(product.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('causal', [True, False])
def test_flops_are_those_of_the_traced_program(style, causal, monkeypatch, matrix_products):
  # In blocks of one query attention computes what is needed and no more.
  monkeypatch.setattr('gptjax.model.attention.BLOCK', 1)
  monkeypatch.setattr('gptjax.model.attention.PARTS', 12)
  context = 12
  described = abstract_model(style, ComputeConfig(attention='blocks' if causal else 'xla'), context)
  loss = lambda parameters, tokens: described.merge(parameters)(tokens).sum()
  traced = jax.make_jaxpr(jax.grad(loss))(described.shapes, jax.ShapeDtypeStruct((3, context), jnp.int32))
  total = sum(map(flops, matrix_products(traced.jaxpr)))
  assert total == flops_per_token(style, context, causal=causal) * 3 * context


@pytest.mark.parametrize('window, global_every, keys', [
  (0, 0, 4 * (1 + 2 + 3 + 4 + 5 + 6)), (2, 0, 4 * (1 + 5 * 2)), (2, 3, 3 * (1 + 5 * 2) + 21), (3, 2, 2 * (1 + 2 + 4 * 3) + 2 * 21),
  (9, 2, 4 * 21)])
def test_attention_counts_the_keys_in_the_window_of_each_layer(window, global_every, keys):
  # Six tokens, four layers, of which every third or second is global; heads that are wider together than the model.
  config = ModelConfig(layers=4, width=8, heads=2, head_size=6, vocab_size=8, window=window, global_every=global_every)
  assert attention_flops(config, 6) * 6 == keys * 2 * (2 * 6 + 2 * 6)
  weights = 4 * (4 * 8 * 12 + 2 * 8 * 32) + 8 * 8
  assert flops_per_token(config, 6) == 6 * weights + 3 * attention_flops(config, 6)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('remat, saved', [('dots', ()), ('full', ()), full('names', ()), full('names', ('q', 'up', 'attention')),
                                          ('names', ('attention_out', 'mlp_norm'))])
@pytest.mark.parametrize('style, norm_at', [('modern', 'pre'), ('modern', 'post'), full('gpt2', 'sandwich')], indirect=['style'])
def test_recomputed_flops_are_those_of_the_traced_program(style, norm_at, remat, saved, matrix_products):
  config, context = dataclasses.replace(style, norm_at=norm_at, head_size=10, layers=1), 12

  def traced(**compute):
    described = abstract_model(config, ComputeConfig(attention='xla', **compute), context)
    loss = lambda parameters, tokens: described.merge(parameters)(tokens).sum()
    program = jax.make_jaxpr(jax.grad(loss))(described.shapes, jax.ShapeDtypeStruct((1, context), jnp.int32))
    return sum(map(flops, matrix_products(program.jaxpr))) / context

  weights = repeated_weights(config, ComputeConfig(remat=remat, saved=saved))
  assert traced(remat=remat, saved=saved) - traced() == 2 * weights + attention_flops(config, context, causal=False)


def test_causal_flops_count_each_key_a_token_sees(style):
  context, weights = 20, 32 * 64  # of the head
  c = style.head_width
  mlp = (3 if style.mlp == 'swiglu' else 2) * 32 * style.hidden_width
  weights += style.layers * (2 * 32 * 32 + 2 * 32 * style.key_heads * c + mlp)
  row = 6 * weights * context
  for token in range(context):
    for key in range(token + 1):
      del key
      row += style.layers * style.heads * 3 * (2 * c + 2 * c)  # score and mixing; forward and twice that backward
  assert flops_per_token(style, context) * context == row
