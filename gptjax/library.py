"""What `import gptjax` offers to notebooks and scripts: models with their tokenizers, and training in one call or step by step."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from gptjax import config as configs
from gptjax import data, training
from gptjax.cache import CACHE
from gptjax.checkpoint import Trained, load_trained, on_devices
from gptjax.config import Config, TokenizerConfig, UserError
from gptjax.data import HeldOut, Tokenizer
from gptjax.data.progress import announce
from gptjax.evaluation import Scorer, Scores, choose_sets
from gptjax.files import expanded, read_json
from gptjax.inference import Activations, Continuation, Generator, Prompt, Sampling, activations
from gptjax.inference.forward import put_batch
from gptjax.interop import load_parameters, open_folder
from gptjax.model import Parameters, parameter_count
from gptjax.sharding import make_mesh, padded_batch_size, process_rows, put_rows
from gptjax.training.workdir import initial_state


def train_tokenizer(texts: Iterable[str], **fields: Any) -> Tokenizer:
  """Trains a tokenizer on texts; the fields are those of data.tokenizer, as kind='bpe' and vocab_size=4096."""
  return data.train_tokenizer(TokenizerConfig(**fields), (data.Document(f'text {n}', text) for n, text in enumerate(texts)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model(Trained):
  """A model with its tokenizer, on all devices: `init` makes one, `load` reads one, a `Trainer` has one."""

  held_out: HeldOut
  """tokenizer, and validation sets if it was trained here"""

  @property
  def tokenizer(self) -> Tokenizer:
    """Converts texts to token ids and back."""
    return self.held_out.tokenizer

  def __repr__(self) -> str:
    return f'<Model of {parameter_count(self.config.model, self.config.data.context):,} parameters at step {self.step}>'

  def forward(self, tokens: ArrayLike, *, hidden_states: bool = False, attentions: bool = False) -> Activations:
    """The logits of rows of token ids [B, T] (or [T]: one row) and, if asked for, hidden states and attention weights."""
    ids = np.atleast_2d(np.asarray(tokens, np.int32))
    (count, length), most = ids.shape, self.model.context
    if not 0 < length <= most:
      raise UserError('tokens', f'{length} per row', f'1 to {most}, the context of the model')
    if wrong := ids[(ids < 0) | (ids >= self.config.model.vocab_size)].tolist():
      raise UserError('tokens', wrong[0], f'ids of the model, 0 to {self.config.model.vocab_size - 1}')
    rows = np.pad(ids, ((0, padded_batch_size(self.mesh, count) - count), (0, 0)))
    with jax.set_mesh(self.mesh):
      run = activations(self.model, self.mesh, hidden_states, attentions)
      return jax.tree.map(lambda x: x[:count], run(self.parameters, put_batch(self.mesh, {'tokens': rows})['tokens']))

  def generate(self, *prompts: Prompt, max_tokens: int = 200, seed: int = 0, stop: Iterable[str] = (), **sampling: Any,
               ) -> list[Continuation]:
    """Continues prompts, texts or conversations [{'role': ..., 'content': ...}, ...], with seeds from `seed` on, until a text ends, has one
    of the strings in `stop`, or `max_tokens`. `sampling`: fields of Sampling, as temperature, top_k and top_p."""
    with jax.set_mesh(self.mesh):
      generator, weights = self._generator
      rows = [generator.prompt(prompt, 'prompt') for prompt in prompts]
      for row in rows:
        if len(row) > self.model.context:
          announce(f'prompt: {len(row):,} tokens, truncated to the last {self.model.context:,}')
      return generator(weights, rows, max_tokens=max_tokens, sampling=Sampling(**sampling), seeds=range(seed, seed + len(rows)),
                       stop=tuple(stop)) if rows else []

  @functools.cached_property
  def _generator(self) -> tuple[Generator, Parameters]:
    generator = Generator(self.model, self.mesh, self.tokenizer)
    return generator, generator.prepare(self.parameters)

  def evaluate(self, sets: Mapping[str, str] | None = None, batch_size: int = 0, cache_dir: str | Path = CACHE) -> Scores:
    """Scores sets of documents by the objective of the config: files or token stores by name, by default the validation sets."""
    config, objective = self.config, self.config.objective
    if objective.draws or objective.needs_reference:
      raise UserError('objective.kind', objective.kind, 'an objective without completions and reference; gptjax.evaluate scores this one')
    cache = expanded(cache_dir)
    chosen, tags = choose_sets(None if sets is None else [f'{name}={path}' for name, path in sets.items()], self.held_out,
                               config.data.source, cache)
    if not chosen:
      raise UserError('sets', chosen, 'NAME: PATH of documents; the model has no validation sets of its own')
    with jax.set_mesh(self.mesh):
      scorer = Scorer(self.model, training.make_objective(config), self.mesh, batch_size or config.microbatch_size)
      return scorer.sets(self.parameters, data.eval_rows(config.data, chosen, cache), tags)


def init(config: Config, tokenizer: Tokenizer) -> Model:
  """A model with initial parameters, drawn from config.seed; its vocabulary is the tokenizer's, unless the config has another size."""
  config = configs.override(config, {'model.vocab_size': config.model.vocab_size or tokenizer.vocab_size})
  model, mesh = on_devices(config)
  with jax.set_mesh(mesh):
    parameters = jax.jit(lambda key: model.initialize(key, model.shardings(0, mesh)))(jax.random.key(config.seed))
  return Model(config, model, mesh, parameters, 0, HeldOut(tokenizer, {}, {}))


def load(path: str | Path, step: str = 'latest', model_axis: int = 0, context: int = 0,
         dtype: Literal['float32', 'bfloat16'] = 'float32') -> Model:
  """The model of a workdir, at `step`: latest, best or a number; or of a Hugging Face folder with config.json, safetensors and a tokenizer,
  of which `context` and `dtype` are as for import_folder. `model_axis`: devices that share each matrix; 0: as in training."""
  folder = expanded(path)
  if not (folder / 'config.json').is_file():
    raise UserError('path', str(path), 'the workdir of a run or a Hugging Face folder, with its config.json')
  if 'model_type' not in read_json(folder / 'config.json'):
    return Model(**vars(load_trained(folder, step, model_axis)), held_out=data.open_held_out(folder / 'data'))
  opened = open_folder(folder, context, dtype=dtype)
  model, mesh = on_devices(opened.config, model_axis)
  parameters = jax.device_put(load_parameters(opened.matched, mesh, opened.entries), model.shardings(0, mesh))
  return Model(opened.config, model, mesh, parameters, 0, HeldOut(opened.tokenizer, {}, {}))


class Trainer:
  """Train steps of a config, one at a time, for loops of your own. It has no workdir, checkpoints or log: `fit` has these."""

  def __init__(self, config: Config, cache_dir: str | Path = CACHE):
    if (objective := config.objective).draws or objective.needs_reference or objective.kind == 'distillation':
      raise UserError('objective.kind', objective.kind, 'an objective that reads rows of the data alone; gptjax.fit trains this one')
    self.data, mesh = data.prepare(config.data, expanded(cache_dir)), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      self.run = training.resolve(config, self.data, mesh)
      self.state = initial_state(self.run, self.data.tokenizer)[0]

  def step(self, batch: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Takes one step on the next rows of the data, or on arrays [batch_size, T] of your own: tokens, targets and mask; returns its metrics.

    A step with a loss or gradient that is not finite changes nothing but the number of the step, and its metrics have bad=True.
    """
    run, size = self.run, self.run.config.batch_size
    with jax.set_mesh(run.mesh):
      rows = run.rows.batch(int(self.state.step) * size + process_rows(run.mesh, size)) if batch is None else dict(batch)
      self.state, metrics = run.step(self.state, put_rows(run.mesh, rows, size))
    return {name: value.tolist() for name, value in jax.device_get(metrics).items()}

  @property
  def model(self) -> Model:
    """The model as it is now; the next step takes its memory."""
    standard = self.run.standard
    with jax.set_mesh(standard.mesh):
      model = standard.model.base
      parameters = standard.model.merged(standard.parameters(self.state.parameters))
      parameters = jax.device_put(parameters, model.shardings(0, standard.mesh))
    return Model(self.run.config, model, standard.mesh, parameters, int(self.state.step), self.data)


def fit(config: Config, workdir: str | Path, cache_dir: str | Path = CACHE, **options: Any) -> Model:
  """Trains a run in a workdir, from its newest checkpoint on if it has one, as the program gptjax.train does; returns its model.

  Ctrl-C saves a checkpoint first. `options` are those of gptjax.training.Options: log_every, stop_at and others.
  """
  if training.train(config, training.Options(expanded(workdir), expanded(cache_dir), **options)):
    raise KeyboardInterrupt
  return load(workdir)
