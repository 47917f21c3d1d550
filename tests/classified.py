"""Texts to classify, and the config of a short run on them."""

import json

from gptjax.config import (
  Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, ObjectiveConfig, SourceConfig, TokenizerConfig, override)

LABELS = ('bad', 'good', 'odd')


def write(folder, count=48):
  """Texts whose class is the number of their words; returns the path."""
  path = folder / 'texts.jsonl'
  path.write_text('\n'.join(json.dumps({'text': ' '.join(['word'] * (i % 3 + 1)) + str(i), 'label': i % 3}) for i in range(count)))
  return path


def settings(path, **values):
  """The config of a short run on texts."""
  return override(Config(
    objective=ObjectiveConfig('classification'), model=ModelConfig(layers=1, width=16, heads=2, positions='rope'),
    data=DataConfig(SourceConfig(str(path), label='label', labels=LABELS), context=32, rows='pack', tokenizer=TokenizerConfig('bytes')),
    mesh=MeshConfig(data=1), eval=EvalConfig(every=4), steps=4, batch_size=4),
    {name.replace('__', '.'): value for name, value in values.items()})
