"""Greedy continuations beside transformers' generate: GPT-2 small's shape, random weights, float32, prompts of unequal length."""

import functools
import math
import os
from collections.abc import Callable

import numpy as np

from gptjax import config as configs
from gptjax import heap
from .contest import OURS, Contest

NEW = 128
"""tokens added to each prompt"""
SHORTEST, LONGEST = 16, 32
"""tokens of the prompts"""
BARS = {1: 1.3, 8: 1.8}
"""least ratio of transformers' CPU-seconds to ours, by prompts at a time"""


def prompts(count: int) -> list[list[int]]:
  """The same random prompts for every implementation; the last one is the longest."""
  rng = np.random.default_rng(0)
  lengths = np.linspace(SHORTEST, LONGEST, count, dtype=int) if count > 1 else [LONGEST]
  return [rng.integers(0, 50257, length).tolist() for length in lengths]


def ours(count: int) -> Callable[[], None]:
  """gptjax: the decoder that gptjax.generate runs."""
  heap.keep_freed_memory()  # as gptjax.start does
  import jax

  from gptjax import inference, model, sharding

  jax.set_mesh(mesh := sharding.make_mesh(configs.MeshConfig()))
  gpt2 = model.abstract_model(configs.ModelConfig(layers=12, width=768, heads=12, vocab_size=50257), configs.ComputeConfig(), 1024)
  shardings = gpt2.shardings(0, mesh)
  parameters = jax.jit(lambda key: gpt2.initialize(key, shardings))(jax.random.key(0))
  decoder = inference.Decoder(gpt2, mesh)
  weights, rows = decoder.prepare(parameters), prompts(count)
  del parameters

  def run():
    tokens = sum(len(ids) for ids, _ in decoder(weights, rows, inference.Sampling(temperature=0.0), range(count), NEW))
    assert tokens == count * NEW

  return run


def theirs(count: int, cache: str) -> Callable[[], None]:
  """transformers, prompts padded on the left; its static cache compiles the step."""
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel

  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  net = GPT2LMHeadModel(GPT2Config()).eval()
  rows = prompts(count)
  width = max(map(len, rows))
  ids = torch.tensor([[50256] * (width - len(row)) + row for row in rows])
  mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

  def run():
    with torch.inference_mode():
      out = net.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=50256,
                         cache_implementation=cache)
    assert out.shape == (count, width + NEW)

  return run


def contest(count: int) -> Contest:
  """A round is one call; costs per token count the tokens of all prompts."""
  return Contest(f'{count} of {SHORTEST} to {LONGEST} tokens' if count > 1 else f'1 of {LONGEST} tokens', {
    OURS: functools.partial(ours, count), 'transformers, dynamic cache': functools.partial(theirs, count, 'dynamic'),
    'transformers, static cache': functools.partial(theirs, count, 'static')}, count * NEW, BARS[count], math.inf)
