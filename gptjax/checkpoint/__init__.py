"""Saving, verifying and restoring checkpoints. All Orbax code is in this package, in `arrays`."""

from gptjax.checkpoint.adapters import BASE, REFERENCE, TEACHER, base_of, keep_run, parameter_reader
from gptjax.checkpoint.arrays import PARAMETERS, by_name
from gptjax.checkpoint.checkpoints import DAMAGED, Checkpoints, Progress, Retention
from gptjax.checkpoint.trained import Contents, Restorer, Trained, load_trained, on_devices
