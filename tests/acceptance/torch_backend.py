"""Puts tasks to a Hugging Face folder through the harness's own torch backend: python -m tests.acceptance.torch_backend --folder=HF ...

Prints its results as JSON and writes what was asked and answered, as gptjax.evaluate --samples does.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from absl import flags

from gptjax import config as configs

_FOLDER = flags.DEFINE_string('folder', None, 'Hugging Face folder with a model and its tokenizer', required=True)
_TASKS = flags.DEFINE_list('tasks', None, 'tasks of configs/tasks', required=True)
_DATA = flags.DEFINE_string('task_data', None, 'folder that they read', required=True)
_LIMIT = flags.DEFINE_integer('limit', 0, 'most examples of each task; 0: all', lower_bound=0)
_SAMPLES = flags.DEFINE_string('samples', None, 'file for what was asked and answered', required=True)
_BATCH = flags.DEFINE_integer('batch_size', 16, 'requests of a batch', lower_bound=1)


def main(_) -> None:
  os.environ |= {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
  with contextlib.redirect_stdout(sys.stderr):
    from lm_eval.models.huggingface import HFLM

    from gptjax.evaluation.tasks import Tasks
    tasks = Tasks(_TASKS.value, data=_DATA.value, limit=_LIMIT.value)
    # Its log-softmax in float32 errs: by 2.3e-3 nats of -1575.4861, the sum over 250 tokens that all of it in float64 gives, as ours does.
    model = HFLM(pretrained=_FOLDER.value, device='cpu', dtype='float32', softmax_dtype='float64', batch_size=_BATCH.value)
    results, samples = tasks(model, samples=True)
  Path(_SAMPLES.value).write_text(''.join(json.dumps(one) + '\n' for one in samples))
  print(json.dumps(results))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
