"""Imported first by each program, not by the library: signals end it with one line, also while it imports what takes seconds."""

import os
import sys

from gptjax import signals

signals.install_handlers()
if os.path.basename(sys.argv[0]).startswith('gptjax-'):
  sys.path.append('')  # modules of one's own are found in the current folder, as by python -m
