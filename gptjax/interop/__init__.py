"""Conversion between runs and Hugging Face folders.

`families` maps config.json and tensors of each published architecture to configs and parameters, and `fields` has what families share;
`importing` makes a run from a folder, and `exporting` a folder from a run, one tensor at a time; `adapters` does so with PEFT's adapters.
Only safetensors are read: a pickle can run code.
"""

from gptjax.interop.adapters import export_adapters, import_adapters, merge_adapters
from gptjax.interop.comparison import Check
from gptjax.interop.exporting import export_run
from gptjax.interop.families import FAMILIES, parse_config
from gptjax.interop.fields import Fields
from gptjax.interop.importing import import_folder, load_parameters, open_folder
