"""Configs of runs as typed, frozen dataclasses, their command-line flags, and the errors that users see."""

from gptjax.config.checks import INT32_MAX, Fault, UserError, divisors, entry, operation, os_mistake
from gptjax.config.data import (
  LEAST_VOCABULARY, Component, DataConfig, Phase, SourceConfig, TokenizerConfig, ValidationSet)
from gptjax.config.durations import Duration, duration_in_steps, in_unit_of_steps
from gptjax.config.fields import checked, differences, flatten, from_json, override, read_config, to_json, unescaped
from gptjax.config.flags import (
  describe, docstrings, exit_stack, exit_status, load, load_config, own_flags, resolved, returned, run, shipped)
from gptjax.config.mesh import (
  AXES, AXIS_NAMES, BATCH_AXES, EXPERTS_AXIS, LAYERS_AXIS, LOCAL_AXES, REST_AXIS, SLICE_AXES, STATE_AXIS, TENSOR_AXIS, TOKENS_AXIS,
  MeshAxis, MeshConfig, PipelineConfig)
from gptjax.config.model import TRAINING_ONLY, ComputeConfig, ModelConfig, RopeConfig, RouterConfig
from gptjax.config.objective import LoraConfig, ObjectiveConfig, Reward, check_objective
from gptjax.config.schema import CheckpointConfig, Config, EvalConfig, FaultsConfig, OptimizerConfig, schedule_warning
