"""Chromium, for tests of pages."""

import contextlib
import importlib.util
import shutil

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
needs_a_browser = [pytest.mark.full, pytest.mark.skipif(
  not (CHROMIUM and importlib.util.find_spec('playwright')), reason='no Chromium on this machine, or no playwright')]


@contextlib.contextmanager
def started():
  """A browser that tests share."""
  from playwright.sync_api import sync_playwright
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])  # containers run as root
    yield browser
    browser.close()


@contextlib.contextmanager
def opened(browser, width, **options):
  """An empty page of a width; no error may occur in it."""
  context, errors = browser.new_context(viewport={'width': width, 'height': 900}, **options), []
  page = context.new_page()
  page.on('pageerror', lambda error: errors.append(error))
  yield page
  context.close()
  assert not errors
