"""Configs of runs as typed, frozen dataclasses, their command-line flags, and the errors that users see."""

from gptjax.config.checks import INT32_MAX, Fault, UserError, check_objective, divisors, operation, os_mistake
from gptjax.config.fields import checked, differences, flatten, from_json, override, read_config, to_json, unescaped
from gptjax.config.flags import describe, docstrings, exit_stack, exit_status, load, own_flags, run, shipped
from gptjax.config.mesh import (
  AXES, AXIS_NAMES, BATCH_AXES, EXPERTS_AXIS, LAYERS_AXIS, LOCAL_AXES, REST_AXIS, SLICE_AXES, STATE_AXIS, TENSOR_AXIS, TOKENS_AXIS,
  MeshAxis, MeshConfig, PipelineConfig)
from gptjax.config.model import TRAINING_ONLY, ComputeConfig, ModelConfig, RopeConfig, RouterConfig
from gptjax.config.schema import (
  LEAST_VOCABULARY, CheckpointConfig, Component, Config, DataConfig, Duration, EvalConfig, FaultsConfig, ObjectiveConfig, OptimizerConfig,
  Phase, SourceConfig, TokenizerConfig, ValidationSet, duration_in_steps, in_unit_of_steps, schedule_warning)
