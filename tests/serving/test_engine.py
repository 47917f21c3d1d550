"""Slots grow as texts do alone, on every mesh."""

import contextlib

import jax
import numpy as np
import pytest
from served import drawn
from tiers import full

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, TokenizerConfig
from gptjax.data import train_tokenizer
from gptjax.inference import Generator, Sampling, suppressed_ids
from gptjax.model import abstract_model
from gptjax.serving import engine as engines
from gptjax.serving.engine import Engine, Settings
from gptjax.sharding import make_mesh
from gptjax.compilations import CompileCounter

SETTINGS = Settings(0.0), Settings(0.9, 10, 0.9, 0.01, 1.2)


def begin(engine, slot, prompt, settings, seed, bias=None):
  """Reads a prompt into a slot; returns the first token of its continuation."""
  engine.admit(slot, prompt, 0, settings, seed, bias or {})
  while engine.slots[slot].unread:
    found = engine.read([slot], scored=False)
  return found[slot]


def one(found):
  return int(found.ids[0]), float(found.logprobs[0])


@pytest.mark.parametrize('sizes, architecture', [
  ((1, 1), {'positions': 'rope', 'window': 8, 'global_every': 2, 'layers': 2}), full((2, 2), {'positions': 'rope'}),
  full((4, 1), {'positions': 'learned'}), full((1, 4), {'positions': 'rope', 'kv_heads': 2})])
def test_slots_draw_what_the_generator_draws(sizes, architecture):
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  config = ModelConfig(**{'layers': 1, 'width': 32, 'heads': 4, 'vocab_size': tokenizer.vocab_size, **architecture})
  mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:sizes[0] * sizes[1]])
  with jax.set_mesh(mesh):
    model = abstract_model(config, ComputeConfig(), 64)
    generator = Generator(model, mesh, tokenizer)
    weights = generator.prepare(drawn(model))
    engine = Engine(model, mesh, weights, suppressed_ids(tokenizer, config), 4)
    prompts = [generator.prompt(text) for text in ('hello world, what', 'a', 'a prompt that is longer than a chunk of a prompt')]
    for settings in SETTINGS:
      expected = generator(weights, prompts, max_tokens=12, sampling=Sampling(*settings[:5]), seeds=[5, 6, 7], stop_ids=())
      order = [2, 0, 3]  # texts begin one after another, in other slots than their numbers
      found = {slot: [] for slot in order}
      for tick in range(16):
        if tick < 3:
          found[order[tick]].append(one(begin(engine, order[tick], prompts[tick], settings, 5 + tick)))
        active = [slot for slot in order[:tick + 1] if len(found[slot]) < 12]
        for slot, drawn_ in (engine.decode(active) if active else {}).items():
          found[slot].append(one(drawn_))
      for row, slot in zip(expected, order, strict=True):
        ids, logprobs = zip(*found[slot], strict=True)
        assert list(ids) == row.ids and np.allclose(logprobs, row.logprobs, atol=1e-5)


def test_a_cache_grows_keeps_what_was_read_and_compiles_nothing_more(parts, monkeypatch):
  generator, weights, engine, mesh = parts
  monkeypatch.setattr(engines, 'SIZES', (24, 48))
  prompt = generator.prompt('some text that is longer than sixteen tokens')
  with jax.set_mesh(mesh):
    small = Engine(engine._model, mesh, weights, (), 3)
    small.compile()
    assert (small.sizes, small.size) == ([24, 48, 96], 24)
    with contextlib.closing(CompileCounter()) as compiled:
      drawn_ids = [one(begin(small, 1, prompt, Settings(0.0), 0))[0]]  # from the first size to the last one, in steps
      begin(small, 0, prompt[:3], Settings(0.5, top_k=3), 0, {70: 1.0})
      drawn_ids += [one(small.decode([0, 1])[1])[0] for _ in range(19)]
    assert compiled.count == 0
    assert small.size == 96 and small.slots[1].tokens == [*prompt, *drawn_ids[:-1]]
    assert drawn_ids == generator(weights, [prompt], max_tokens=20, sampling=Sampling(0.0), stop_ids=())[0].ids


def test_a_slot_counts_no_tokens_while_its_prompt_is_read(parts):
  generator, _, engine, mesh = parts
  prompt = generator.prompt('abc')
  with jax.set_mesh(mesh):
    engine.admit(1, prompt, 0, Settings(), 1, {})
    drawn_ids = [one(begin(engine, 0, prompt, Settings(), 0))[0], *(one(engine.decode([0])[0])[0] for _ in range(4))]
    counts = np.asarray(engine._texts.counts)
  assert not counts[1].any() and counts[0].sum() == 5 and set(np.flatnonzero(counts[0])) == set(drawn_ids)
