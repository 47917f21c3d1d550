"""Conversion between runs and Hugging Face folders.

`families` says for each published architecture which tensor is which parameter; `importing` makes a run from a folder, and `exporting`
a folder from a run, a tensor at a time. Only safetensors are read: a pickle can run code.
"""

from gptjax.interop.comparison import CHECKS, Check
from gptjax.interop.exporting import DTYPES, export_run
from gptjax.interop.families import FAMILIES, Family, Fields, family_for, parse_config
from gptjax.interop.importing import import_folder

__all__ = ['CHECKS', 'DTYPES', 'FAMILIES', 'Check', 'Family', 'Fields', 'export_run', 'family_for', 'import_folder', 'parse_config']
