"""The model room: Flax NNX modules of the transformer, its parameters as plain data, and what it costs.

Modules know logical axes ('embed', 'heads', 'mlp', 'vocab'), never how many devices there are. Nothing here imports data,
training or checkpoints.
"""

from gptjax.model.accounting import flops_per_token, parameter_count
from gptjax.model.attention import Cache, Caches, Place
from gptjax.model.kernels import attention_backend
from gptjax.model.loss import cross_entropy, log_probabilities
from gptjax.model.parameters import Blueprint, Parameters, blueprint, split
from gptjax.model.transformer import Block, Transformer, empty_cache
from gptjax.model.weights import Copy

__all__ = [
  'Block', 'Blueprint', 'Cache', 'Caches', 'Copy', 'Parameters', 'Place', 'Transformer', 'attention_backend', 'blueprint',
  'cross_entropy', 'empty_cache', 'flops_per_token', 'log_probabilities', 'parameter_count', 'split',
]
