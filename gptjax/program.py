"""Imported first by each program: signals end it with one line while it imports what takes seconds. The library itself handles none."""

from gptjax import signals

signals.install_handlers()
