"""The page to chat on, in a real browser."""

import time

import pytest
from browser import needs_a_browser, opened, started
from test_api import wait

pytestmark = needs_a_browser


@pytest.fixture(scope='module')
def browser():
  with started() as browser:
    yield browser


@pytest.fixture(params=[1280, 400])
def page(server, browser, request):
  """The page at a width, with short answers; it may ask this server alone."""
  with opened(browser, request.param) as page:
    asked = []
    page.on('request', lambda one: asked.append(one.url))
    page.goto(server.url)
    page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
    page.get_by_text('Settings').click()
    page.get_by_label('max_tokens').fill('8')
    page.get_by_label('seed').fill('1')
    yield page
  assert all(url.startswith((server.url, 'data:')) for url in asked)


def messages(page):
  return [(one.get_attribute('class'), one.evaluate('box => box.firstChild.textContent')) for one in page.locator('article').all()]


def say(page, text):
  page.get_by_label('Message').fill(text)
  page.get_by_label('Message').press('Enter')


def answered(page, count):
  page.wait_for_function('count => document.querySelectorAll("article").length === count'
                         ' && document.getElementById("send").textContent === "Send"', arg=count)


def test_a_conversation_is_answered_kept_and_edited(server, page):
  say(page, 'Hi')
  answered(page, 2)
  expected = server.ask('/v1/chat/completions', {'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 8, 'seed': 1,
                                                 'temperature': 0.8})[1]['choices'][0]['message']['content']
  assert messages(page) == [('user', 'Hi'), ('assistant', expected)]
  page.reload()
  assert messages(page) == [('user', 'Hi'), ('assistant', expected)]  # and the settings are kept
  say(page, 'A')
  answered(page, 4)
  page.get_by_role('button', name='Edit').last.click()
  assert page.get_by_label('Message').input_value() == 'A' and len(messages(page)) == 2
  say(page, 'B')
  answered(page, 4)
  assert messages(page)[2] == ('user', 'B')
  wide = page.evaluate('document.documentElement.scrollWidth <= document.documentElement.clientWidth')
  assert wide, 'the page scrolls sideways'
  page.get_by_role('button', name='New').click()
  assert not messages(page)
  page.reload()
  assert not messages(page)


def test_an_answer_is_streamed_and_stopped(server, page, monkeypatch):
  wait(lambda: not server.scheduler.running)
  cancelled, decode = server.scheduler.counts['cancelled'], server.scheduler._engine.decode
  monkeypatch.setattr(server.scheduler._engine, 'decode', lambda *args: time.sleep(0.05) or decode(*args))
  page.get_by_label('max_tokens').fill('60')
  say(page, 'Hi')
  page.wait_for_function('document.querySelector("article.assistant")?.textContent')
  page.get_by_role('button', name='Stop').click()
  answered(page, 2)
  wait(lambda: server.scheduler.counts['cancelled'] > cancelled and not server.scheduler.running)
  assert 0 < len(messages(page)[1][1]) < 60


def test_a_text_is_continued_and_a_mistake_is_told(page):
  page.get_by_label('continue a text').check()
  say(page, 'Once')
  answered(page, 2)
  page.get_by_label('temperature').fill('3')
  say(page, 'more')
  answered(page, 4)
  assert messages(page)[3][0] == 'error' and 'from 0 to 2' in messages(page)[3][1]
