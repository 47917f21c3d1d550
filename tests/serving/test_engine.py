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
def test_slots_draw_what_the_generator_draws(sizes, architecture, monkeypatch):
  monkeypatch.setattr(engines, 'CHUNKS', (8, 32))
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  config = ModelConfig(**{'layers': 1, 'width': 32, 'heads': 4, 'vocab_size': tokenizer.vocab_size, **architecture})
  mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:sizes[0] * sizes[1]])
  with jax.set_mesh(mesh):
    model = abstract_model(config, ComputeConfig(), 64)
    generator = Generator(model, mesh, tokenizer)
    weights = generator.prepare(drawn(model))
    engine = Engine(model, mesh, weights, suppressed_ids(tokenizer, config), 12)
    texts = 'hello world, what', 'a', 'b c', 'short', 'a prompt that is longer than a chunk of a prompt', 'late'
    prompts = [generator.prompt(text) for text in texts]
    slots, begin_at = [2, 0, 3, 1, 11, 10], [0, 0, 0, 0, 1, 3]  # other slots than their numbers; some begin together, some later
    for settings in SETTINGS:
      expected = generator(weights, prompts, max_tokens=12, sampling=Sampling(*settings[:5]), seeds=range(5, 11), stop_ids=())
      found = {slot: [] for slot in slots}
      together = 0
      for tick in range(20):
        for row, slot in enumerate(slots):
          if begin_at[row] == tick:
            engine.admit(slot, prompts[row], 0, settings, 5 + row, {})
        begun = [slot for row, slot in enumerate(slots) if begin_at[row] <= tick]
        if waiting := [slot for slot in begun if engine.slots[slot].unread]:
          read = engine.read(waiting, scored=False)
          together = max(together, len(read))
          for slot, first in read.items():
            found[slot] += [] if first is None else [one(first)]
        active = [slot for slot in begun if not engine.slots[slot].unread and len(found[slot]) < 12]
        for slot, drawn_ in (engine.decode(active) if active else {}).items():
          found[slot].append(one(drawn_))
      assert together > 1 or engine.groups == 4, 'prompts are read together'
      for row, slot in zip(expected, slots, strict=True):
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
    counts = np.asarray(engine._tables.counts)
  assert not counts[1].any() and counts[0].sum() == 5 and set(np.flatnonzero(counts[0])) == set(drawn_ids)
