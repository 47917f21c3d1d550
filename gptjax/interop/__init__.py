"""The interop room: models of other codebases in, ours out. Hugging Face's folders are what everyone reads.

A table for each published family says which tensor is which parameter; a folder becomes a run, and a run a folder, a tensor at a
time. Only safetensors are read: a pickle can run code.
"""

from gptjax.interop.comparison import CHECKS, Check
from gptjax.interop.exporting import DTYPES, Export, export_run
from gptjax.interop.families import FAMILIES, Family, Fields, family, family_for
from gptjax.interop.importing import Import, import_folder

__all__ = [
  'CHECKS', 'DTYPES', 'FAMILIES', 'Check', 'Export', 'Family', 'Fields', 'Import', 'export_run', 'family', 'family_for', 'import_folder',
]
