"""The import notices every setting that could be misread, by its tensors or its logits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_families import DECODER, ours
from tiers import full

from gptjax.config import ComputeConfig, UserError
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.interop import FAMILIES, Check, Fields
from gptjax.interop.comparison import COMPARED, compare_logits, our_logits
from gptjax.interop.matching import check_tensors, match
from gptjax.interop.tensor_files import read_tensors
from gptjax.model import abstract_model, stack_layers

torch = transformers = None

LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 1024}
LARGE = DECODER | {'max_position_embeddings': 4096, 'rope_theta': 5e5, 'head_dim': 16}
SLIDING = LARGE | {'sliding_window': 100, 'query_pre_attn_scalar': 20}


def rope(**changes):
  return lambda config: {'rope': dataclasses.replace(config.rope, **changes)}


THETA, NO_SCALING = rope(theta=4e5), rope(scaling='none')
TIES = lambda config: {'tied': not config.tied}
WINDOWS = [{'window': 99}, {'window': 101}, {'window': 0, 'global_every': 0}]

MISREAD = {
  'llama': (LARGE | {'rope_scaling': LLAMA3}, [THETA, NO_SCALING, rope(factor=7.0), rope(low=1.5), rope(high=3.0), rope(scaling='linear'),
                                               rope(original_context=512), {'window': 64}, {'norm_eps': 1e-2}, {'logit_cap': 2.0}, TIES]),
  'qwen3': (LARGE | {'rope_scaling': {'type': 'linear', 'factor': 4.0}}, [THETA, NO_SCALING, rope(factor=3.0), {'window': 64},
                                                                         {'query_pre_attn_scalar': 12.0}, TIES]),
  'mistral': (SLIDING, [THETA, rope(scaling='linear', factor=2.0), {'norm_eps': 1e-2}, {'mlp': 'geglu'}, {'global_every': 3}, TIES,
                        *WINDOWS]),
  'gemma2': (SLIDING, [THETA, {'global_every': 3}, {'global_every': 0}, {'attention_cap': 0.0}, {'logit_cap': 0.0}, {'logit_cap': 29.0},
                       {'query_pre_attn_scalar': 16.0}, {'scaled_embedding': False}, {'norm': 'rmsnorm'}, TIES, *WINDOWS]),
  'gemma3_text': (SLIDING | {'sliding_window_pattern': 3}, [THETA, rope(local_theta=2e4), rope(local_theta=0.0), {'global_every': 2},
                                                            {'mlp': 'swiglu'}, {'query_pre_attn_scalar': 16.0}, TIES,
                                                            *WINDOWS])}


@pytest.mark.parametrize('family', ['gemma2', *map(full, sorted(MISREAD.keys() - {'gemma2'}))])
def test_every_misreading_of_a_config_is_noticed(family, one_device, tmp_path):
  (shape, misreadings), kind = MISREAD[family], FAMILIES[family]
  torch.manual_seed(0)
  with torch.no_grad():
    config = transformers.AutoConfig.for_model(family, **shape)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    for parameter in reference.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
    model, context = kind.read(Fields(shape))
  reference.save_pretrained(tmp_path)
  entries = read_tensors(tmp_path)
  scanned = ComputeConfig(scan=True)  # one layer is traced instead of three
  parameters = stack_layers(ours(family, model, {key: value.detach().numpy() for key, value in reference.named_parameters()}))
  placed = jax.device_put(parameters, abstract_model(model, scanned, context).shardings(0, one_device))

  def compare(config):
    described = abstract_model(config, scanned, context)
    check_tensors(match(kind, described, context, entries), kind, str(tmp_path), entries)
    tokens = Check().tokens(ByteTokenizer(), described, shape)  # which a misread config chooses too
    return compare_logits(our_logits(described, placed, one_device, tokens), logits(tokens.tobytes()), 1e-3)

  @functools.cache
  def logits(data):
    ids, positions = torch.from_numpy(np.frombuffer(data, np.int32).reshape(2, -1).copy()).long()
    with torch.no_grad():
      return reference(ids[None], attention_mask=torch.ones_like(ids[None]), position_ids=positions[None],
                       use_cache=False).logits[0, -COMPARED:].numpy()

  assert compare(model)
  for change in misreadings:
    with pytest.raises(UserError, match='nothing was written|it is missing|tie_word_embeddings'):
      print(change, compare(dataclasses.replace(model, **(change(model) if callable(change) else change))))
  print(f'noticed of {family}: {len(misreadings)}')  # for the bar of this name
