"""Configs of runs as typed, frozen dataclasses, their command-line flags, and the errors that users see."""

from gptjax.config.checks import INT32_MAX, Fault, UserError, divisors
from gptjax.config.fields import checked, differences, flatten, from_json, override, read_config, to_json
from gptjax.config.flags import describe, docstrings, exit_stack, exit_status, load, own_flags, run
from gptjax.config.mesh import AXES, AXIS_NAMES, MATRIX_AXIS, REST_AXIS, ROW_AXES, SLICE_AXES, STATE_AXIS, MeshAxis, MeshConfig
from gptjax.config.model import ComputeConfig, ModelConfig, RopeConfig
from gptjax.config.schema import (
  CheckpointConfig, Component, Config, DataConfig, Duration, EvalConfig, FaultsConfig, OptimizerConfig, Phase, SourceConfig,
  TokenizerConfig, ValidationSet, duration_in_steps, in_unit_of_steps)

__all__ = [
  'AXES', 'AXIS_NAMES', 'CheckpointConfig', 'Component', 'ComputeConfig', 'Config', 'DataConfig', 'Duration', 'EvalConfig', 'Fault',
  'FaultsConfig', 'INT32_MAX', 'MATRIX_AXIS', 'MeshAxis', 'MeshConfig', 'ModelConfig', 'OptimizerConfig', 'Phase', 'REST_AXIS',
  'ROW_AXES', 'RopeConfig', 'SLICE_AXES', 'STATE_AXIS', 'SourceConfig', 'TokenizerConfig', 'UserError', 'ValidationSet',
  'checked', 'describe', 'differences', 'divisors', 'docstrings', 'duration_in_steps', 'exit_stack', 'exit_status', 'flatten',
  'from_json', 'in_unit_of_steps', 'load', 'override', 'own_flags', 'read_config', 'run', 'to_json',
]
