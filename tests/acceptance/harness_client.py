"""Puts tasks to a server through the harness's client of OpenAI's interface: python -m tests.acceptance.harness_client --port=PORT ...

Prints its results as JSON and writes what was asked and answered, as gptjax.evaluate --samples does.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from absl import flags

from gptjax import config as configs

_PORT = flags.DEFINE_integer('port', None, 'of the server on this machine', required=True)
_FOLDER = flags.DEFINE_string('folder', None, 'Hugging Face folder with the tokenizer of the model', required=True)
_TASKS = flags.DEFINE_list('tasks', None, 'tasks of configs/tasks', required=True)
_DATA = flags.DEFINE_string('task_data', None, 'folder that they read', required=True)
_LIMIT = flags.DEFINE_integer('limit', 0, 'most examples of each task; 0: all', lower_bound=0)
_SAMPLES = flags.DEFINE_string('samples', None, 'file for what was asked and answered', required=True)


def main(_) -> None:
  os.environ |= {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
  with contextlib.redirect_stdout(sys.stderr):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from gptjax.evaluation.tasks import Tasks
    tasks = Tasks(_TASKS.value, data=_DATA.value, limit=_LIMIT.value)
    model = LocalCompletionsAPI(base_url=f'http://127.0.0.1:{_PORT.value}/v1/completions', model='run', tokenizer=_FOLDER.value,
                                tokenizer_backend='huggingface', num_concurrent=4, max_length=256, batch_size=1)
    results, samples = tasks(model, samples=True)
  Path(_SAMPLES.value).write_text(''.join(json.dumps(one) + '\n' for one in samples))
  print(json.dumps(results))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
