"""Every recipe of the repository loads, states what to expect, and survives config.json."""

from pathlib import Path

import pytest

from gptjax import config as configs

RECIPES = sorted((Path(__file__).parents[2] / 'configs').glob('*.py'))
LARGE = [path for path in RECIPES if path.stem.startswith(('gpt2', 'llama', 'moe_1b'))]
by_name = pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
large_by_name = pytest.mark.parametrize('path', LARGE, ids=lambda path: path.stem)


@by_name
def test_it_survives_config_json(path):
  config = configs.load(str(path))
  assert configs.from_json(configs.to_json(config)) == config


@by_name
def test_it_says_what_to_expect(path):
  assert 'Expected' in path.read_text().split('"""')[1]


@large_by_name
def test_its_mesh_divides_its_batch_and_heads(path):
  config = configs.load(str(path))
  assert config.microbatch_size % (config.mesh.replica * config.mesh.data) == 0 == config.data.context % (2 * config.mesh.context)
  assert config.model.heads % config.mesh.model == 0 and config.model.key_heads % config.mesh.model == 0


@large_by_name
def test_it_can_be_planned_without_data(path):
  config = configs.load(str(path))
  assert config.model.vocab_size and config.mesh.data > 0 and 'tokens' in config.steps


def test_there_are_ten_large_recipes():
  assert len(LARGE) == 10
