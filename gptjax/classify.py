"""Classifies texts with a trained model.

  python -m gptjax.classify --workdir=DIR --text='Call now to win!'
  python -m gptjax.classify --workdir=DIR --texts=FILE --out=FILE.jsonl
"""

import gptjax.program  # noqa: F401  (first: it handles signals)
import json
import sys
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax import distributed
from gptjax.config import SourceConfig, UserError, unescaped
from gptjax.files import expanded, writable, write_results
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run with objective.kind=classification', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to use: latest, best (lowest validation loss), or a step')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 0, 'tensor parallel devices; 0: as in training if the devices allow it', lower_bound=0)
_TEXT = flags.DEFINE_string('text', '', r'text to classify; in it \n is a line end, \t a tab and \\ a backslash')
_TEXTS = flags.DEFINE_string('texts', None, "file of texts instead of --text: one per line, or JSON lines with the run's "
                             'data.source.text')
_OUT = flags.DEFINE_string('out', None, 'file for JSON lines of text, label and probabilities; default: stdout')


def main(_) -> None:
  cache = start()
  import jax

  from gptjax import checkpoint, data, inference

  if bool(_TEXT.value) == bool(_TEXTS.value):
    raise UserError('--text', _TEXT.value, 'a text, or --texts=FILE')
  if _OUT.value:
    writable(_OUT.value, '--out')
  workdir = expanded(_WORKDIR.value, '--workdir')
  trained = checkpoint.load_trained(workdir, _STEP.value, _MODEL_AXIS.value)
  held_out = data.open_held_out(workdir / 'data')
  texts = [('--text', unescaped(_TEXT.value))]
  if _TEXTS.value:
    fields: dict[str, Any] = {'text': trained.config.data.source.text} if data.is_json_lines(_TEXTS.value) else {'separator': '\\n'}
    source = data.open_source(SourceConfig(_TEXTS.value, **fields), cache)
    texts = [(one.name, one.text.strip('\n')) for one in data.documents(source)]
  with jax.set_mesh(trained.mesh):
    classifier = inference.Classifier(trained.model, trained.mesh, held_out.tokenizer)
    read = [classifier.ids(text, place) for place, text in texts]
    found = classifier(trained.parameters, read)
  if not distributed.is_primary():
    return
  print(trained.description, file=sys.stderr)
  if cut := sum(len(ids) > classifier.longest for ids in read):
    print(f'{cut:,} of {len(read):,} texts are longer than the context: only their last {classifier.longest} tokens were read',
          file=sys.stderr)
  probabilities = [dict(zip(held_out.labels, row, strict=True)) for row in found.tolist()]
  if _TEXTS.value or _OUT.value:
    lines = ''.join(json.dumps({'text': text, 'label': max(one, key=one.__getitem__), 'probabilities': one}) + '\n'
                    for (_, text), one in zip(texts, probabilities, strict=True))
    write_results(expanded(_OUT.value), lines) if _OUT.value else print(lines, end='')
  else:
    for label, value in sorted(probabilities[0].items(), key=lambda one: -one[1]):
      print(f'{label:<{max(map(len, held_out.labels))}}  {value:.4f}')


def script() -> None:
  """The command gptjax-classify."""
  configs.run(main, needs_config=False)


if __name__ == '__main__':
  script()
