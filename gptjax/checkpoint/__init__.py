"""The checkpoint room: what a run keeps on disk of its state, and how it comes back; the only room that knows Orbax."""

from gptjax.checkpoint.checkpoints import DAMAGED, Checkpoints, Progress, Retention
from gptjax.checkpoint.trained import Restorer, Trained, read_config, load_trained

__all__ = ['DAMAGED', 'Checkpoints', 'Progress', 'Restorer', 'Retention', 'Trained', 'read_config', 'load_trained']
