"""The transformer as Flax NNX modules, its parameters as plain data, and its cost.

Modules know logical axes ('embed', 'heads', 'mlp', 'vocab') and the rows of one device, never how many devices there are. Nothing
here imports data, training or checkpoints.
"""

from gptjax.model.attention import Cache, Caches, Positions, left_padded, positions_of
from gptjax.model.dispatch import exchanges
from gptjax.model.experts import load_metrics
from gptjax.model.grouped import expert_backend
from gptjax.model.head import FixedHead, Head
from gptjax.model.layers import Sums
from gptjax.model.kernels import attention_backend
from gptjax.model.layout import Slots, stack_layers, stacked_name, unstack_layers
from gptjax.model.parameters import (
  AbstractModel, Parameters, abstract_model, active_parameters, attention_flops, flops_per_token, model_of, parameter_count,
  repeated_products, repeated_weights, slots_of, step_flops, stored_model)
from gptjax.model.transformer import Block, Transformer, empty_cache
