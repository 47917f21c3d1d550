"""Every family against transformers: logits, gradients of the loss, and decoding with a cache, for shapes of every kind."""

import collections

import jax
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig, UserError
from gptjax.inference import activations
from gptjax.interop import FAMILIES, Fields, parse_config
from gptjax.model import abstract_model, stack_layers
from gptjax.training import next_token

torch = transformers = None

VOCABULARY = 50
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 32}
DECODER = {'vocab_size': VOCABULARY, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
           'num_key_value_heads': 2, 'max_position_embeddings': 64}
EXPERTS = {'num_experts': 8, 'num_experts_per_tok': 2}
SHAPES = {
  'gpt2': [{'vocab_size': VOCABULARY, 'n_positions': 64, 'n_embd': 32, 'n_layer': 2, 'n_head': 4},
           {'vocab_size': VOCABULARY, 'n_positions': 64, 'n_embd': 24, 'n_layer': 3, 'n_head': 2, 'n_inner': 40,
            'tie_word_embeddings': False}],
  'llama': [DECODER, DECODER | {'num_key_value_heads': 1, 'tie_word_embeddings': True, 'rope_parameters': LLAMA3, 'rms_norm_eps': 1e-5},
            DECODER | {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 100.0}, 'head_dim': 16}],
  'mistral': [DECODER | {'sliding_window': 7},
              DECODER | {'sliding_window': None, 'num_key_value_heads': 4, 'head_dim': 16, 'tie_word_embeddings': True}],
  'qwen2': [DECODER, DECODER | {'num_key_value_heads': 4, 'tie_word_embeddings': True}],
  'qwen3': [DECODER | {'head_dim': 16}, DECODER | {'num_key_value_heads': 1, 'head_dim': 8, 'tie_word_embeddings': True}],
  'gemma2': [DECODER | {'head_dim': 16, 'sliding_window': 7, 'query_pre_attn_scalar': 20},
             DECODER | {'num_key_value_heads': 4, 'head_dim': 8, 'sliding_window': 16, 'num_hidden_layers': 2, 'tie_word_embeddings': False,
                        'attn_logit_softcapping': 1.0, 'final_logit_softcapping': 2.0}],
  'gemma3_text': [DECODER | {'head_dim': 16, 'sliding_window': 7,
                             'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention']},
                  DECODER | {'num_key_value_heads': 1, 'head_dim': 8, 'sliding_window': 5, 'num_hidden_layers': 7,
                             'tie_word_embeddings': False}],
  'olmo2': [DECODER, DECODER | {'num_key_value_heads': 4, 'num_hidden_layers': 2, 'tie_word_embeddings': True}],
  'mixtral': [DECODER | {'num_local_experts': 4}, DECODER | {'num_local_experts': 6, 'num_experts_per_tok': 3, 'sliding_window': 7}],
  'qwen3_moe': [DECODER | EXPERTS | {'moe_intermediate_size': 24, 'decoder_sparse_step': 2, 'head_dim': 16, 'norm_topk_prob': True},
                DECODER | EXPERTS | {'moe_intermediate_size': 16, 'tie_word_embeddings': True}],
  'olmoe': [DECODER | EXPERTS, DECODER | EXPERTS | {'num_key_value_heads': 4, 'norm_topk_prob': True, 'num_experts_per_tok': 1}],
}
CASES = [pytest.param(name, shape, id=f'{name}-{index}') for name, shapes in SHAPES.items() for index, shape in enumerate(shapes)]


def reference(name, shape):
  """A model of transformers with random values in all its parameters."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(name, **shape)
  config._attn_implementation = 'eager'  # the one that every family has
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model


def published(tensors):
  """Tensors under their names in published files, which have one per expert; transformers 5 stacks them in memory, not in its files."""
  found = {}
  for name, value in tensors.items():
    stem, _, matrix = name.rpartition('.experts.')
    parts = {'gate_up_proj': ('gate_proj', 'up_proj'), 'down_proj': ('down_proj',)}.get(matrix, ()) if stem else ()
    for part, of_all in zip(parts, np.split(value, max(len(parts), 1), -2 if parts else 0)):
      found |= {f'{stem}.experts.{expert}.{part}.weight': one for expert, one in enumerate(of_all)}
    if not parts:
      found[name] = value
  return found


MIXTRAL = {'.mlp.': '.block_sparse_moe.', '.gate_proj.': '.w1.', '.up_proj.': '.w3.', '.down_proj.': '.w2.'}


def ours(name, config, tensors):
  """Our parameters out of a model's tensors."""
  found, tensors = collections.defaultdict(list), published(tensors)
  for theirs, here in MIXTRAL.items() if name == 'mixtral' else ():
    tensors = {key.replace(theirs, here): value for key, value in tensors.items()}
  for tensor in FAMILIES[name].tensors(config):
    value = tensors.pop(tensor.name)
    value = value.T if tensor.transposed else value
    for part, parameter in zip(np.split(value, len(tensor.parameters), -1), tensor.parameters, strict=True):
      if tensor.rows:
        axis = 1 if tensor.transposed else 0
        part = np.pad(part, [(0, config.table_rows - VOCABULARY if i == axis else 0) for i in range(2)])
      found[parameter].append((part, tensor.expert))
  assert not tensors
  return {key: parts[0][0] if parts[0][1] is None else np.stack([part for part, _ in parts]) for key, parts in found.items()}


# A scan traces one layer, so that it is cheaper for several lengths.
can_scan = lambda shape: 'decoder_sparse_step' not in shape
SMALLEST = [(full if name in ('mixtral', 'olmoe') else pytest.param)(name, shapes[0], can_scan(shapes[0]), (33,), id=name)
            for name, shapes in SHAPES.items()]
EVERY = [full(name, shape, scan, lengths, id=f'{name}-{index}-{"scan" if scan else "unrolled"}')
         for name, shapes in SHAPES.items() for index, shape in enumerate(shapes)
         for scan, lengths in ((False, (33,)), (True, (3, 16, 33) if index else (3, 16))) if can_scan(shape) or not scan]


@pytest.mark.parametrize('name, shape, scan, lengths', SMALLEST + EVERY)
def test_logits_and_gradients_are_those_of_transformers(name, shape, scan, lengths, one_device):
  model = reference(name, shape)
  values = model.config.to_dict() | {'architectures': [type(model).__name__]}
  family, config, context = parse_config(values)
  assert family is FAMILIES[name]
  worst = [0.0, 0.0]
  described = abstract_model(config, ComputeConfig(scan=scan), context)
  parameters = ours(name, config, {key: p.detach().numpy() for key, p in model.named_parameters()})
  if scan:
    parameters = stack_layers(parameters)
  assert {key: p.shape for key, p in parameters.items()} == {key: s.shape for key, s in described.shapes.items()}
  placed = jax.device_put(parameters, described.shardings(0, one_device))
  for length in lengths:
    tokens = np.random.default_rng(length).integers(2, VOCABULARY, (2, length), np.int32)  # 0 or 1 pads: no gradient there
    model.zero_grad()
    result = model(torch.from_numpy(tokens.astype(np.int64)), labels=torch.from_numpy(tokens.astype(np.int64)))
    result.loss.backward()

    @jax.jit
    def run(parameters, batch):
      def loss(parameters):
        model = described.merge(parameters)
        hidden = model.hidden(batch['tokens'])[0]
        found = next_token()(model.head, hidden, batch)
        return found.loss / found.targets, model.head.logits(hidden)
      return jax.value_and_grad(loss, has_aux=True)(parameters)

    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0
    (loss, logits), gradients = run(placed, {'tokens': tokens, 'targets': np.roll(tokens, -1, 1), 'mask': mask})
    logits = np.asarray(logits)[:, :VOCABULARY].reshape(*tokens.shape, -1)
    np.testing.assert_allclose(logits, result.logits.detach().numpy(), rtol=0, atol=1e-4)
    worst[0] = max(worst[0], np.abs(logits - result.logits.detach().numpy()).max())
    np.testing.assert_allclose(loss, result.loss.item(), 1e-5)
    theirs = ours(name, config, {key: p.grad.numpy() for key, p in model.named_parameters()})
    theirs = stack_layers(theirs) if scan else theirs
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for key, gradient in gradients.items():
      # Some are zero but for rounding, as those of biases of keys.
      scale = max(np.abs(theirs[key]).max(), 1e-3 * largest)
      np.testing.assert_allclose(gradient, theirs[key], 1e-3, 1e-4 * scale, err_msg=key)
      worst[1] = max(worst[1], np.abs(gradient - theirs[key]).max() / scale)
  print(f'worst of {name}: logits {worst[0]:.1e}, gradients {worst[1]:.1e}')  # for the bar of this name


@pytest.mark.parametrize('name', ['gpt2', 'llama', 'gemma2', full('qwen3'), full('olmo2'), full('mixtral')])
def test_hidden_states_and_attention_weights_are_those_of_transformers(name, one_device):
  model = reference(name, SHAPES[name][-1])
  _, config, context = parse_config(model.config.to_dict() | {'architectures': [type(model).__name__]})
  described = abstract_model(config, ComputeConfig(), context)
  parameters = ours(name, config, {key: p.detach().numpy() for key, p in model.named_parameters()})
  tokens = np.random.default_rng(0).integers(2, VOCABULARY, (2, 19), np.int32)
  found = activations(described, one_device, True, True)(jax.device_put(parameters, described.shardings(0, one_device)), tokens)
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens.astype(np.int64)), output_attentions=True, output_hidden_states=True)
  assert len(found.attentions) == len(theirs.attentions) == config.layers and len(found.hidden_states) == len(theirs.hidden_states)
  np.testing.assert_allclose(found.logits, theirs.logits, rtol=0, atol=1e-4)
  for a, b in zip(found.attentions, theirs.attentions):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  for a, b in zip(found.hidden_states[:-1], theirs.hidden_states[:-1]):  # theirs is normalized at the end
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name, shape', CASES)
def test_a_family_reads_the_config_that_it_writes(name, shape):
  values = transformers.AutoConfig.for_model(name, **shape).to_dict()
  config, context = FAMILIES[name].read(Fields(values))
  written = FAMILIES[name].write(config, context)
  assert FAMILIES[name].read(Fields(written)) == (config, context)
  # transformers understands it alike.
  theirs = transformers.AutoConfig.for_model(name, **written).to_dict()
  assert FAMILIES[name].read(Fields(theirs)) == (config, context)


@pytest.mark.parametrize('name', SHAPES)
def test_missing_fields_have_the_defaults_of_their_class(name):
  def read(values):
    try:
      return FAMILIES[name].read(Fields(values))
    except UserError as error:  # such as 8 key/value heads by default for 4 heads
      return str(error)

  complete = {key: value for key, value in SHAPES[name][0].items() if key != 'layer_types'}
  assert read({}) == read(transformers.AutoConfig.for_model(name).to_dict())
  for missing in FAMILIES[name].columns:
    sparse = {key: value for key, value in complete.items() if key != missing}
    default = transformers.AutoConfig.for_model(name, **sparse).to_dict().get(missing, sparse.get(missing))
    assert read(sparse) == read(sparse if default is None else sparse | {missing: default}), missing
