"""The config room: typed, frozen dataclasses that say what a run is, and the flags and errors around them."""

from gptjax.config.checks import LARGEST
from gptjax.config.errors import Fault, UserError
from gptjax.config.flags import (
    at_end,
    checked,
    describe,
    differences,
    docstrings,
    ending,
    flatten,
    from_json,
    load,
    override,
    own_flags,
    read,
    run,
    to_json,
)
from gptjax.config.mesh import AXES, AXIS_NAMES, MATRIX_AXIS, ROW_AXES, STATE_AXIS, MeshAxis, MeshConfig
from gptjax.config.model import ComputeConfig, ModelConfig, RopeConfig
from gptjax.config.schema import (
    CheckpointConfig,
    Component,
    Config,
    DataConfig,
    Duration,
    EvalConfig,
    FaultsConfig,
    OptimizerConfig,
    Phase,
    SourceConfig,
    TokenizerConfig,
    ValidationSet,
    duration_in_steps,
    in_unit_of_steps,
)

__all__ = [
    'AXES', 'AXIS_NAMES', 'CheckpointConfig', 'Component', 'ComputeConfig', 'Config', 'DataConfig', 'Duration', 'EvalConfig', 'Fault', 'FaultsConfig', 'LARGEST', 'MATRIX_AXIS', 'MeshAxis', 'MeshConfig',
    'ModelConfig', 'OptimizerConfig', 'Phase', 'ROW_AXES', 'RopeConfig', 'STATE_AXIS', 'SourceConfig', 'TokenizerConfig', 'UserError', 'ValidationSet',
    'at_end', 'checked', 'describe', 'differences', 'docstrings', 'duration_in_steps', 'ending', 'flatten', 'from_json', 'in_unit_of_steps',
    'load', 'override', 'own_flags', 'read', 'run', 'to_json',
]
