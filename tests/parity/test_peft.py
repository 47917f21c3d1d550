"""Adapters that PEFT opens, and adapters that it saved: the logits are the same on both sides."""

import json

import numpy as np
import pytest
from tiers import full
from tiny import config as tiny_config
from tiny import run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Restorer
from gptjax.config import UserError, read_config
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.interop import Check, export_adapters, export_run, import_adapters, import_folder
from gptjax.interop.comparison import our_logits
from gptjax.interop.tensor_files import read_header

torch = transformers = peft = None

SHAPE = {'vocab_size': 261, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 64, 'initializer_range': 0.3}
GPT2 = {'vocab_size': 261, 'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 64, 'initializer_range': 0.3, 'bos_token_id': 1,
        'eos_token_id': 2}
TOKENS = np.random.default_rng(0).integers(0, 256, 40)


@pytest.fixture(scope='module', params=['gpt2', full('llama'), full('qwen3')])
def base(request, tmp_path_factory):
  """A folder that transformers saved, and the run that it becomes."""
  folder = tmp_path_factory.mktemp(request.param)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(request.param, **(GPT2 if request.param == 'gpt2' else SHAPE))
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / 'hf')
  ByteTokenizer().save_hugging_face(folder / 'hf')
  import_folder(folder / 'hf', folder / 'run', check=Check('none'))
  return folder / 'hf', folder / 'run', request.param


def logits(workdir, step='latest'):
  """Ours of the last tokens, with adapters merged."""
  restorer = Restorer(workdir)
  tokens = np.stack([TOKENS, np.arange(len(TOKENS))]).astype(np.int32)
  return our_logits(restorer.model, restorer.restore(restorer.checkpoints.resolve(step)).parameters, restorer.mesh, tokens)


def their_logits(model, count):
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS[None])).logits[0, -count:].numpy()


@pytest.mark.parametrize('changes', [{}, full({'lora.stabilized': True, 'lora.targets': ('blocks/*/attention/[qv]/*', 'blocks/1/mlp/*')})])
def test_peft_opens_ours(changes, base, tmp_path):
  folder, source, kind = base
  settings = tiny_config(write_text(tmp_path / 'text.txt', 40), steps=3, eval__every=0, optimizer__peak_lr=0.03,
                         data__tokenizer__path=str(source / 'data' / 'tokenizer'), init_from=str(source))
  settings = configs.override(settings, {'lora.rank': 3, **changes})
  settings = configs.override(settings, {f'model.{name}': value for name, value in configs.flatten(read_config(source).model).items()})
  run(configs.override(settings, {'data.context': 64}), tmp_path / 'run', tmp_path)
  export_adapters(tmp_path / 'run', tmp_path / 'adapter', base=str(folder))
  ours = logits(tmp_path / 'run')
  theirs = their_logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / 'adapter'), len(ours))
  assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max() and np.abs(ours - logits(source)).max() > 0.1
  export_run(tmp_path / 'run', tmp_path / 'merged', check=Check('none'))
  again = their_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'merged'), len(ours))
  assert np.abs(ours - again).max() < 1e-5 * np.abs(theirs).max()
  import_adapters(tmp_path / 'adapter', source, tmp_path / 'back')
  assert np.abs(logits(tmp_path / 'back') - ours).max() < 1e-5 * np.abs(ours).max()


def saved_by_peft(folder, out, **settings):
  """The model with random adapters, which are saved in `out`."""
  torch.manual_seed(1)
  model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(**settings))
  for name, value in model.named_parameters():
    if 'lora_B' in name:
      torch.nn.init.normal_(value, std=0.3)
  model.save_pretrained(out)
  return model


@pytest.mark.parametrize('rslora', [False, full(True)])
def test_ours_opens_pefts(rslora, base, tmp_path):
  folder, source, kind = base
  first = {'gpt2': 'c_attn'}.get(kind, 'q_proj')
  module = {'gpt2': 'transformer.h.1.attn.c_attn'}.get(kind, 'model.layers.1.self_attn.q_proj')
  model = saved_by_peft(folder, tmp_path / 'adapter', r=4, lora_alpha=6, use_rslora=rslora, fan_in_fan_out=kind == 'gpt2',
                        target_modules=[first, 'c_fc' if kind == 'gpt2' else 'down_proj'], rank_pattern={module: 2},
                        alpha_pattern={module: 9})
  import_adapters(tmp_path / 'adapter', source, tmp_path / 'run')
  ours = logits(tmp_path / 'run')
  theirs = their_logits(model, len(ours))
  assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max() and np.abs(ours - logits(source)).max() > 0.1


def test_other_kinds_of_adapters_are_refused(base, tmp_path):
  folder, source, kind = base
  target = 'c_attn' if kind == 'gpt2' else 'q_proj'
  saved_by_peft(folder, tmp_path / 'adapter', r=2, target_modules=[target], fan_in_fan_out=kind == 'gpt2')
  file = tmp_path / 'adapter' / 'adapter_config.json'
  values = json.loads(file.read_text())
  for name, value in {'peft_type': 'IA3', 'use_dora': True, 'bias': 'all', 'modules_to_save': ['lm_head'], 'r': 0, 'lora_bias': True,
                      'init_lora_weights': 'pissa', 'alpha_pattern': {'(': 3}, 'rank_pattern': ['x'], 'layer_replication': [[0, 2]],
                      'new_field': 3}.items():
    file.write_text(json.dumps(values | {name: value}))
    with pytest.raises(UserError, match=f'adapter_config.json: {name}: '):
      import_adapters(tmp_path / 'adapter', source, tmp_path / 'run')
  file.write_text(json.dumps(values))
  weights = tmp_path / 'adapter' / 'adapter_model.safetensors'
  good = {name: entry.view().copy() for name, entry in read_header(weights).items()}
  name = next(iter(good))
  from safetensors.numpy import save_file
  for tensors, words in (({name.replace(target, 'c_atn'): good[name], name.replace(target, 'c_atn').replace('A', 'B'): good[name].T.copy()},
                          'linear layers of the model'),
                         ({name: good[name]}, r'A \[rank, inputs\] and B'), ({'base_model.model.lm_head.weight': good[name]}, 'plain LoRA'),
                         ({one: np.concatenate([value, value], int('lora_A' in one)) for one, value in good.items()},
                          'outputs and inputs of this layer'),
                         ({}, 'one layer or more')):
    save_file(tensors, weights)
    with pytest.raises(UserError, match=words):
      import_adapters(tmp_path / 'adapter', source, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
