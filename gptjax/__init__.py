"""Build large language models from scratch in JAX: from raw text to a trained, evaluated, sampled transformer.

The names of the library (docs/library.md) are imported when they are used: `import gptjax` alone takes no time and changes nothing.
"""

import importlib

__version__ = '0.1.0'

_MODULES = {
  'Config': 'config', 'UserError': 'config', 'load_config': 'config', 'load_tokenizer': 'data',
  **dict.fromkeys(('train_tokenizer', 'Model', 'init', 'load', 'Trainer', 'fit'), 'library')}
__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}; its names are {", ".join(_MODULES)}')
  return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_MODULES})
