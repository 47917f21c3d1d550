"""What the script of a report draws, in a real browser."""

import json
import math

import pytest
from browser import needs_a_browser, opened, started

from gptjax.config import Config, override, to_json
from tools.report import page as report

pytestmark = needs_a_browser


def write(folder, width, count=400):
  """A run whose loss falls, with noise, and has a gap."""
  folder.mkdir()
  (folder / 'config.json').write_text(to_json(override(Config(), {'model.width': width})))
  (folder / 'run.json').write_text('{"device": "1 of 1 cpu"}')
  rows = [{'step': 5 * n, 'loss': None if n == 300 else 2 + 6 / n + 0.2 * math.sin(7.0 * n), 'grad_norm': 50 / n, 'learning_rate': 1e-3,
           'tokens': 1000 * n, 'tokens_per_second': 100.0} for n in range(1, count + 1)]
  rows += [{'step': 5 * count, 'eval/valid/loss': 2.25, 'eval/valid/bits_per_byte': 1.5}]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Pages of one run and of five."""
  home = tmp_path_factory.mktemp('report')
  runs = [write(home / f'width {width}', width) for width in (64, 128, 256, 384, 512)]
  for name, some in (('one', runs[:1]), ('five', runs)):
    (home / f'{name}.html').write_text(report(some))
  return home


@pytest.fixture(scope='module')
def browser():
  with started() as browser:
    yield browser


@pytest.fixture(params=[1280, 400])
def page(browser, request):
  """An empty page at a width, without a network."""
  with opened(browser, request.param, offline=True) as page:
    yield page


def heights(page, figure=0):
  """The vertical places of the thickest curve of a chart."""
  path = page.locator('figure').nth(figure).locator('path[stroke-width="1.7"]').first.get_attribute('d')
  return [float(point.split()[1]) for point in path.replace('M', 'L').split('L')[1:]]


def labels(page, figure=0):
  return page.locator('figure').nth(figure).locator('text').all_text_contents()


@pytest.mark.parametrize('name, lines', [('one', 1), ('five', 5)])
def test_charts_are_drawn_and_fit_the_page(files, page, name, lines):
  page.goto((files / f'{name}.html').as_uri())
  titles = page.locator('figcaption b').all_text_contents()
  assert titles == ['Loss', 'Validation', 'Learning rate', 'Gradient norm', 'Speed']
  assert page.locator('figure').nth(3).locator('path').count() == lines * 2  # the curve, and faint what it smooths
  assert 'not finite from here' in labels(page) and 'nats per token' in labels(page)
  assert page.evaluate('document.documentElement.scrollWidth <= document.documentElement.clientWidth'), 'the page scrolls sideways'
  for figure in page.locator('figure').all():  # ticks do not overlap
    boxes = [one.bounding_box() for one in figure.locator('text[text-anchor="middle"]').all()[:-2]]
    assert all(a['x'] + a['width'] <= b['x'] for a, b in zip(boxes, boxes[1:]))


def test_the_reader_smooths_changes_axes_and_hides_lines(files, page):
  page.goto((files / 'five.html').as_uri())
  rough = lambda: sum(abs(a - b) for a, b in zip(heights(page), heights(page)[1:]))
  page.locator('#smoothing').evaluate("slider => { slider.value = 0; slider.dispatchEvent(new Event('input', {bubbles: true})) }")
  before = rough()
  page.locator('#smoothing').evaluate("slider => { slider.value = 10; slider.dispatchEvent(new Event('input', {bubbles: true})) }")
  assert rough() < before / 3
  assert '2 k' in labels(page) and 'step' in labels(page)
  page.locator('#axis').select_option('tokens')
  assert '400 k' in labels(page) and 'tokens' in labels(page)
  page.locator('#axis').select_option('hours')
  assert 'hours of training' in labels(page) and '1' in labels(page)  # 400,000 tokens at 100 per second: 1.1 hours
  linear = heights(page, 3)
  page.locator('#scale').select_option('linear')
  assert heights(page, 3) != linear  # 50 to 0.1: automatically logarithmic
  page.locator('.key', has_text='width 128').click()
  assert page.locator('figure').nth(4).locator('path').count() == 4 * 2


def test_the_pointer_shows_values(files, page):
  page.goto((files / 'one.html').as_uri())
  box = page.locator('figure svg').first.bounding_box()
  page.mouse.move(box['x'] + box['width'] - 9, box['y'] + 50)
  tip = page.locator('figure .tip').first
  assert tip.is_visible() and tip.locator('div').all_text_contents()[-1] == 'valid: 2.25' and tip.text_content().startswith('step 2 k')
  shown = tip.bounding_box()
  assert shown['x'] >= 0 and shown['x'] + shown['width'] <= page.viewport_size['width']
