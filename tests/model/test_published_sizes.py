"""The large recipes have the sizes that were published."""

from pathlib import Path

import pytest

from gptjax import config as configs
from gptjax.model import parameter_count

ROOT = Path(__file__).parents[2]

PUBLISHED = {
  'gpt2_124m': 124_439_808, 'gpt2_355m': 354_823_168, 'gpt2_774m': 774_030_080, 'gpt2_1558m': 1_557_611_200,
  'llama_1b': 1_235_814_400, 'llama_1b_128k': 1_235_814_400, 'llama_7b': 6_738_415_616, 'llama_13b': 13_015_864_320,
  'llama_70b': 68_976_648_192,
}
"""Parameters of the published weights: GPT-2's of Hugging Face's transformers, the others' of their model cards."""


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_those_published(name):
  path = ROOT / f'configs/{name}.py'
  config = configs.load(str(path))
  model = config.model
  padding = (model.table_rows - model.vocab_size) * model.width * (1 if model.tied else 2)
  assert parameter_count(model, config.data.context) - padding == PUBLISHED[name]
  assert f'Expected: {PUBLISHED[name]:,} parameters' in path.read_text()
