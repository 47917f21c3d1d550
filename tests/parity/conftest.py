"""PyTorch and transformers take seconds to import: only the worker that runs a module's tests imports them, before the first one.

Until then the module has None under their names.
"""

import pytest


@pytest.fixture(autouse=True, scope='module')
def references(request):
  """Imports them into the module, or skips its tests where they are not installed."""
  for name in {'torch', 'transformers', 'peft'} & vars(request.module).keys():
    setattr(request.module, name, pytest.importorskip(name, reason='pip install -r requirements-parity.txt'))
