"""The modern style against transformers: Llama (rope, rmsnorm, swiglu, grouped queries) and Qwen3 (qk_norm too)."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.config import ComputeConfig, ModelConfig, RopeConfig
from gptjax.model import abstract_model

torch = transformers = None
pytestmark = pytest.mark.full

CONTEXT = 80  # above one block of queries
CONFIG = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, vocab_size=50, vocab_multiple=1, positions='rope',
    rope=RopeConfig(theta=500.0), norm='rmsnorm', mlp='swiglu', bias=False)
REFERENCE = {
    'num_hidden_layers': 2, 'hidden_size': 32, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8,
    'intermediate_size': 48, 'vocab_size': 50, 'max_position_embeddings': CONTEXT, 'rms_norm_eps': 1e-5,
    'attn_implementation': 'eager', 'pad_token_id': None,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}}
PARTS = {
    'input_layernorm': 'attention_norm/gain', 'post_attention_layernorm': 'mlp_norm/gain',
    'self_attn.q_norm': 'attention/q_norm/gain', 'self_attn.k_norm': 'attention/k_norm/gain',
    'self_attn.q_proj': 'attention/q/kernel', 'self_attn.k_proj': 'attention/k/kernel',
    'self_attn.v_proj': 'attention/v/kernel', 'self_attn.o_proj': 'attention/out/kernel',
    'mlp.gate_proj': 'mlp/gate/kernel', 'mlp.up_proj': 'mlp/up/kernel', 'mlp.down_proj': 'mlp/down/kernel'}


def renamed(values):
  """gptjax's names and [input, output] kernels for arrays by transformers' names."""
  out = {}
  for name, value in values.items():
    name = name.removeprefix('model.').removesuffix('.weight')
    if name == 'embed_tokens':
      out['tokens/table'] = value
    elif name == 'norm':
      out['norm/gain'] = value
    elif name == 'lm_head':
      out['lm_head/kernel'] = value.T
    else:
      _, layer, part = name.split('.', 2)
      out[f'blocks/{layer}/{PARTS[part]}'] = value.T if value.ndim == 2 else value
  return out


STYLES = [('Llama', 'none', False), ('Llama', 'none', True), ('Qwen3', 'head', False)]


@pytest.mark.parametrize('name, qk_norm, tied', STYLES)
def test_logits_and_every_gradient_are_those_of_transformers(name, qk_norm, tied, one_device):
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(**REFERENCE, tie_word_embeddings=tied)
  model = getattr(transformers, f'{name}ForCausalLM')(config).float()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  tokens = np.random.default_rng(1).integers(0, 50, (2, CONTEXT), np.int32)
  direction = np.random.default_rng(2).standard_normal((2, CONTEXT, 50), np.float32)
  expected = model(torch.from_numpy(tokens.astype(np.int64))).logits
  (expected * torch.from_numpy(direction)).sum().backward()

  described = abstract_model(dataclasses.replace(CONFIG, qk_norm=qk_norm, tied=tied), ComputeConfig(), CONTEXT)
  parameters = renamed({name: p.detach().numpy() for name, p in model.named_parameters()})
  assert parameters.keys() == described.shapes.keys()

  @jax.jit
  def run(parameters, tokens):
    def dot(parameters):
      logits = described.merge(parameters)(tokens)
      return (logits * direction).sum(), logits
    return jax.grad(dot, has_aux=True)(parameters)

  gradients, logits = run(jax.device_put(parameters, described.shardings(0, one_device)), tokens)
  np.testing.assert_allclose(logits, expected.detach().numpy(), 1e-4, 1e-4)
  theirs = renamed({name: p.grad.numpy() for name, p in model.named_parameters()})
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, theirs[name], 1e-3, 1e-4 * np.abs(theirs[name]).max(), err_msg=name)
