"""The config room: typed, frozen dataclasses that say what a run is, and the flags and errors around them."""

from gptjax.config.errors import UserError
from gptjax.config.flags import checked, describe, differences, docstrings, flatten, from_json, load, override, run, to_json
from gptjax.config.schema import (
    CheckpointConfig,
    Component,
    Config,
    DataConfig,
    Duration,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Phase,
    SourceConfig,
    TokenizerConfig,
    ValidationSet,
    duration_in_steps,
    in_unit_of_steps,
)

__all__ = [
    'CheckpointConfig', 'Component', 'Config', 'DataConfig', 'Duration', 'EvalConfig', 'MeshConfig', 'ModelConfig',
    'OptimizerConfig', 'Phase', 'SourceConfig', 'TokenizerConfig', 'UserError', 'ValidationSet', 'checked', 'describe', 'differences',
    'docstrings', 'duration_in_steps', 'flatten', 'from_json', 'in_unit_of_steps', 'load', 'override', 'run', 'to_json',
]
