"""The config room: typed, frozen dataclasses that say what a run is, and the flags and errors around them."""

from gptjax.config.errors import UserError
from gptjax.config.flags import describe, differences, flatten, from_json, load, override, run, to_json
from gptjax.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    Duration,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    duration_in_steps,
)

__all__ = [
    'CheckpointConfig', 'Config', 'DataConfig', 'Duration', 'EvalConfig', 'MeshConfig', 'ModelConfig',
    'OptimizerConfig', 'TokenizerConfig', 'UserError', 'describe', 'differences', 'duration_in_steps', 'flatten',
    'from_json', 'load', 'override', 'run', 'to_json',
]
