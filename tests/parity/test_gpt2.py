"""The GPT-2 style against the reference: transformers' GPT-2 on the same weights, and AdamW steps of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ComputeConfig, ModelConfig, OptimizerConfig
from gptjax.model import abstract_model
from gptjax.sharding import put_rows
from gptjax.training import TrainState, learning_rates, make_optimizer, next_token, train_step
from gptjax.training.guard import initial_statistics

torch = transformers = None
pytestmark = pytest.mark.full

CONTEXT = 80  # above one block of queries
CONFIG = ModelConfig(layers=2, width=32, heads=4, vocab_size=50, vocab_multiple=1)


def reference():
  """transformers' model with every parameter random, without dropout, in float32."""
  torch.manual_seed(0)
  config = transformers.GPT2Config(
      vocab_size=50, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
      attn_implementation='eager', bos_token_id=1, eos_token_id=2)
  model = transformers.GPT2LMHeadModel(config).float()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model


def renamed(values):
  """gptjax's names for the arrays of GPT-2, by transformers' names; q, k and v are parts of c_attn there."""
  parts = {'ln_1': 'attention_norm', 'ln_2': 'mlp_norm', 'attn.c_proj': 'attention/out', 'mlp.c_fc': 'mlp/up',
           'mlp.c_proj': 'mlp/down', 'ln_f': 'norm'}
  out = {'tokens/table': values['transformer.wte.weight'], 'positions/table': values['transformer.wpe.weight']}
  for name, value in values.items():
    *layer, part, kind = name.removeprefix('transformer.').removeprefix('h.').split('.')
    if part in ('wte', 'wpe', 'lm_head'):
      continue
    prefix = f'blocks/{layer[0]}/' if layer else ''
    part = '.'.join([*layer[1:], part])
    if part == 'attn.c_attn':
      for head, cut in zip('qkv', np.split(value, 3, -1), strict=True):
        out[f'{prefix}attention/{head}/' + {'weight': 'kernel', 'bias': 'bias'}[kind]] = cut
    else:
      weight = 'gain' if part.startswith('ln_') else 'kernel'
      out[f'{prefix}{parts[part]}/' + {'weight': weight, 'bias': 'bias'}[kind]] = value
  return out


def weights(model):
  return renamed({name: p.detach().numpy().copy() for name, p in model.named_parameters()})


def gradients(model):
  return renamed({name: p.grad.numpy().copy() for name, p in model.named_parameters()})


def text(rows, seed=1):
  return np.random.default_rng(seed).integers(0, 50, (rows, CONTEXT + 1), np.int32)


def torch_loss(model, rows):
  ids = torch.from_numpy(rows.astype(np.int64))
  return torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())


def batch_of(rows):
  return {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'mask': np.ones(rows[:, 1:].shape, np.float32)}


def on_mesh(values, described, zero_stage, mesh):
  assert values.keys() == described.shapes.keys()
  return jax.device_put(values, described.shardings(zero_stage, mesh))


@pytest.mark.parametrize('attention', ['blocks', 'xla'])
def test_logits_loss_and_every_gradient_are_those_of_transformers(attention, one_device):
  model, rows = reference(), text(2)
  described = abstract_model(CONFIG, ComputeConfig(attention=attention), CONTEXT)
  parameters = on_mesh(weights(model), described, 0, one_device)

  @jax.jit
  def run(parameters, batch):
    def loss(parameters):
      module = described.merge(parameters)
      found = next_token()(module.head, module.hidden(batch['tokens'])[0], batch)
      return found.loss / found.targets
    return described.merge(parameters)(batch['tokens']), *jax.value_and_grad(loss)(parameters)

  logits, loss, ours = run(parameters, batch_of(rows))
  with torch.no_grad():
    expected = model(torch.from_numpy(rows[:, :-1].astype(np.int64))).logits.numpy()
  np.testing.assert_allclose(logits, expected, 1e-4, 1e-4)
  expected_loss = torch_loss(model, rows)
  expected_loss.backward()
  np.testing.assert_allclose(loss, expected_loss.item(), 1e-5)
  theirs = gradients(model)
  assert ours.keys() == theirs.keys()
  for name, gradient in ours.items():
    scale = np.abs(theirs[name]).max()
    np.testing.assert_allclose(gradient, theirs[name], 1e-4, 1e-4 * scale + 1e-7, err_msg=name)


@pytest.mark.parametrize(
    'mesh, zero_stage, microbatches, clip', [('1x1', 0, 1, 1e6), ('4x2', 3, 2, 0.5)], indirect=['mesh'])
def test_steps_of_adamw_are_those_of_pytorch(mesh, zero_stage, microbatches, clip):
  # eps well above rounding: the gradient of the keys' biases is zero but for rounding, which Adam would blow up.
  config = OptimizerConfig(peak_lr=1e-2, schedule='constant', b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.3, clip=clip)
  model, durations = reference(), {'steps': 3, 'warmup': 0, 'decay': 0}
  groups = [{'params': [p for p in model.parameters() if p.ndim > 1], 'weight_decay': config.weight_decay},
            {'params': [p for p in model.parameters() if p.ndim == 1], 'weight_decay': 0.0}]
  adamw = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(config.b1, config.b2), eps=config.eps)

  described = abstract_model(CONFIG, ComputeConfig(), CONTEXT)
  optimizer = make_optimizer(config)
  step = train_step(described, next_token(), optimizer, learning_rates(config, **durations),
                    zero_stage=zero_stage, mesh=mesh, microbatches=microbatches, seed=0)
  parameters = on_mesh(weights(model), described, zero_stage, mesh)
  start = weights(model)
  state = TrainState(jnp.zeros((), jnp.int32), parameters, {}, jax.jit(optimizer.init)(parameters), initial_statistics())
  for index in range(3):
    rows = text(8, seed=index)
    adamw.zero_grad()
    loss = torch_loss(model, rows)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    assert (norm > clip) == (clip < 1)  # clipping is at work in one of the cases
    adamw.step()
    state, metrics = step(state, put_rows(mesh, batch_of(rows), len(rows)))
    np.testing.assert_allclose(metrics['loss'], loss.item(), 1e-4)
    np.testing.assert_allclose(metrics['grad_norm'], norm.item(), 1e-4)
  theirs = weights(model)
  for name, value in state.parameters.items():
    assert np.abs(theirs[name] - start[name]).max() > 1e-3 or name.endswith('k/bias')
    np.testing.assert_allclose(value, theirs[name], 1e-4, 2e-5, err_msg=name)
