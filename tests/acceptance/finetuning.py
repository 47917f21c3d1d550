"""Bars of fine-tuning: supervised fine-tuning and preferences against trl, adapters against PEFT."""

import json
from pathlib import Path

import numpy as np

from tests.acceptance.record import Result, bar, python, train
from tests.published_tokenizers import FAMILIES

STEPS, BATCH, CONTEXT, RATE = 20, 8, 128, 1e-3
QUESTIONS = ('What is {} plus {}?', 'Add {} and {}.', 'Please tell me the sum of {} and of {}')
KINDS = {
  'text': ['--config.data.source.prompt={q}\\n', '--config.data.source.completion=a'],
  'chat': ['--config.data.source.prompt=q', '--config.data.source.completion=a', '--config.data.source.chat=template'],
  'pairs': ['--config.data.source.prompt={q}\\n', '--config.data.source.chosen=a', '--config.data.source.rejected=b']}


@bar
def sft_against_trl(folder: Path) -> Result:
  worst = _against_trl(folder, 'sft', {kind: fields for kind, fields in KINDS.items() if kind != 'pairs'})
  return Result('an imported model fine-tuned on completions, of texts and of conversations: 20 losses and gradient norms within 1e-4 of '
                'those of trl on the same batches', ', '.join(f'{kind}: {value:.1e}' for kind, value in worst.items()),
                max(worst.values()) <= 1e-4, 'python -m tests.acceptance --only=sft_against_trl')


@bar
def dpo_against_trl(folder: Path) -> Result:
  worst = _against_trl(folder, 'preference', {'pairs': KINDS['pairs']})
  return Result('an imported model trained with DPO on pairs: 20 losses and gradient norms within 1e-4 of those of trl on the same batches',
                f'{worst["pairs"]:.1e}', worst['pairs'] <= 1e-4, 'python -m tests.acceptance --only=dpo_against_trl')


def _against_trl(folder: Path, objective: str, kinds: dict[str, list[str]]) -> dict[str, float]:
  """Largest relative difference of losses and gradient norms by kind of data."""
  records = [{'q': QUESTIONS[i % 3].format(i, i * 7 % 31), 'a': ' and '.join([f'that is {i + i * 7 % 31}'] * (1 + i % 3)), 'b': f'no {i}'}
             for i in range(400)]
  (folder / 'sums.jsonl').write_text('\n'.join(map(json.dumps, records)))
  _write_model(folder / 'model')
  python('tools.import_hf', f'--folder={folder}/model', f'--workdir={folder}/imported')
  worst = {}
  for kind, fields in kinds.items():
    flags = [f'--config.init_from={folder}/imported', f'--config.data.tokenizer.path={folder}/imported/data/tokenizer', *fields,
             f'--config.data.source.path={folder}/sums.jsonl', '--config.data.rows=document', f'--config.objective.kind={objective}',
             f'--config.data.context={2 * CONTEXT}', f'--config.batch_size={BATCH}', f'--config.steps={STEPS}',
             '--config.optimizer.warmup=0', '--config.optimizer.name=adamw', '--config.optimizer.schedule=constant',
             f'--config.optimizer.peak_lr={RATE}', '--config.optimizer.weight_decay=0', '--config.eval.sample_tokens=0',
             '--config.data.isolate_documents=true', '--log_every=1']
    lines = [line for line in train('shakespeare_char_cpu', folder / kind, *flags) if 'loss' in line]
    ours = np.array([[line['loss'], line['grad_norm']] for line in lines])
    theirs = _trained_by_trl(folder / 'model', folder / kind, records, kind)
    worst[kind] = float(np.abs(ours / theirs - 1).max())
  return worst


def _write_model(folder: Path) -> None:
  """A Llama with random values, and a tokenizer with a chat template."""
  import torch
  import transformers
  folder.mkdir()
  FAMILIES['llama3'](folder)
  torch.manual_seed(0)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  config = transformers.LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2 * CONTEXT, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
  transformers.LlamaForCausalLM(config).float().save_pretrained(folder)


def _trained_by_trl(model: Path, workdir: Path, records: list[dict], kind: str) -> np.ndarray:
  """Losses and gradient norms of SFTTrainer or DPOTrainer [STEPS, 2], on the examples of each step of our run."""
  import datasets
  import torch
  import transformers
  import trl

  from gptjax.cache import cache_dir
  from gptjax.config import read_config
  from gptjax.data import prepare, train_rows
  config = read_config(workdir)
  data = prepare(config.data, cache_dir())
  texts = [data.tokenizer.decode(row[mask > 0]) for row, mask in zip(*(
    train_rows(config, data).batch(np.arange(STEPS * BATCH))[name] for name in ('tokens', 'segments')), strict=True)]
  number = lambda text: next(i for i, record in enumerate(records) if record['q'] in text)
  chosen = [records[number(text)] for text in texts]
  if kind == 'chat':
    rows = [{'prompt': [{'role': 'user', 'content': one['q']}], 'completion': [{'role': 'assistant', 'content': one['a']}]}
            for one in chosen]
  else:
    rows = [{'prompt': f'{one["q"]}\n', **({'chosen': one['a'], 'rejected': one['b']} if kind == 'pairs' else {'completion': one['a']})}
            for one in chosen]
  kinds = (trl.DPOConfig, trl.DPOTrainer) if kind == 'pairs' else (trl.SFTConfig, trl.SFTTrainer)
  settings = kinds[0](
    output_dir=str(workdir / 'trl'), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type='constant',
    adam_beta1=config.optimizer.b1, adam_beta2=config.optimizer.b2, adam_epsilon=config.optimizer.eps, weight_decay=0.0,
    max_grad_norm=config.optimizer.clip, logging_steps=1, logging_nan_inf_filter=False, report_to='none', save_strategy='no', use_cpu=True,
    bf16=False, max_length=CONTEXT, train_sampling_strategy='sequential', gradient_checkpointing=False, disable_tqdm=True)
  trainer = kinds[1](
    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=settings,
    train_dataset=datasets.Dataset.from_list(rows), processing_class=transformers.AutoTokenizer.from_pretrained(model))
  trainer.train()
  return np.array([[line['loss'], line['grad_norm']] for line in trainer.state.log_history if 'grad_norm' in line])


@bar
def lora_against_peft(folder: Path) -> Result:
  import peft
  import torch
  import transformers
  _write_model(folder / 'model')
  (folder / 'text.txt').write_text(' '.join(QUESTIONS[i % 3].format(i, i * 7 % 31) for i in range(2000)))
  python('tools.import_hf', f'--folder={folder}/model', f'--workdir={folder}/base')
  tokens = np.random.default_rng(0).integers(0, 200, (1, 100))
  logits = lambda model: model.eval()(torch.tensor(tokens)).logits[0].detach().numpy()
  load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
  losses = [line for line in train(
    'shakespeare_char_cpu', folder / 'ours', f'--config.init_from={folder}/base', f'--config.data.source.path={folder}/text.txt',
    f'--config.data.tokenizer.path={folder}/base/data/tokenizer', f'--config.data.context={CONTEXT}', '--config.lora.rank=8',
    f'--config.steps={STEPS}', '--config.optimizer.name=adamw', f'--config.optimizer.peak_lr={RATE}', '--config.optimizer.warmup=0',
    '--config.eval.sample_tokens=0') if 'eval/valid/loss' in line]
  python('tools.export_peft', f'--workdir={folder}/ours', f'--folder={folder}/adapter', f'--base={folder}/model')
  python('tools.merge_lora', f'--workdir={folder}/ours', f'--out={folder}/merged')
  score = json.loads(python('gptjax.evaluate', f'--workdir={folder}/merged').stdout.splitlines()[-1])['loss']
  theirs = peft.get_peft_model(load(folder / 'model'), peft.LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], lora_alpha=12))
  for name, value in theirs.named_parameters():
    if 'lora_B' in name:
      torch.nn.init.normal_(value, std=0.05)
  theirs.save_pretrained(folder / 'peft')
  python('tools.import_peft', f'--folder={folder}/peft', f'--base={folder}/base', f'--workdir={folder}/imported')
  differences = {'start': abs(score / losses[-1]['eval/valid/loss'] - 1)}
  opened = peft.AutoPeftModelForCausalLM.from_pretrained(folder / 'adapter')
  for name, workdir, model in (('ours in peft', 'ours', opened), ("peft's in ours", 'imported', theirs)):
    ours = _logits(folder / workdir, tokens)
    differences[name] = float(np.abs(ours - logits(model)).max())
    changed = float(np.abs(ours - logits(load(folder / 'model'))).max())
    assert changed > 1e-2, f'{name}: the adapters change logits by {changed} alone'
  differences['merged against unmerged, loss'] = differences.pop('start')
  return Result('an adapter trained here and opened by peft, and one of peft opened here: logits within 1e-5; merged equals unmerged '
                'within 1e-5, an imported model in float32', ', '.join(f'{name}: {value:.1e}' for name, value in differences.items()),
                max(differences.values()) <= 1e-5, 'python -m tests.acceptance --only=lora_against_peft')


def _logits(workdir: Path, tokens: np.ndarray) -> np.ndarray:
  """Ours, with adapters merged, without those of padded ids."""
  import jax

  from gptjax.checkpoint import load_trained
  trained = load_trained(workdir)
  with jax.set_mesh(trained.mesh), jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(lambda parameters: trained.model.merge(parameters)(tokens))(trained.parameters))[
      0, :, :trained.config.model.vocab_size]
