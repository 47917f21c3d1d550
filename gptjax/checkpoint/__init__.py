"""Saving, verifying and restoring checkpoints. All Orbax code is in this package."""

from gptjax.checkpoint.checkpoints import DAMAGED, Checkpoints, Progress, Retention, by_name
from gptjax.checkpoint.trained import Contents, Restorer, Trained, load_trained
