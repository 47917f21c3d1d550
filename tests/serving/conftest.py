"""A server of a random model for bytes."""

import jax
import pytest
from served import CONTEXT, Server, drawn

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, TokenizerConfig
from gptjax.data import train_tokenizer
from gptjax.inference import Generator, suppressed_ids
from gptjax.model import abstract_model
from gptjax.serving.engine import Engine
from gptjax.sharding import make_mesh


@pytest.fixture(scope='session')
def parts():
  """(generator, weights, engine, mesh) of a model that has learned nothing, whose distributions are far from flat."""
  pytest.importorskip('starlette')
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  tokenizer.plain_chat = True
  mesh = make_mesh(MeshConfig(data=1, model=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    config = ModelConfig(layers=1, width=32, heads=2, vocab_size=tokenizer.vocab_size, positions='rope')
    model = abstract_model(config, ComputeConfig(), CONTEXT)
    generator = Generator(model, mesh, tokenizer)
    weights = generator.prepare(drawn(model))
    engine = Engine(model, mesh, weights, suppressed_ids(tokenizer, model.config), 3)
    engine.compile()
  return generator, weights, engine, mesh


@pytest.fixture(scope='session')
def server(parts):
  server = Server(*parts)
  yield server
  server.close()
