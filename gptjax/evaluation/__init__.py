"""The evaluation room: scores of a model over held-out documents, in full."""

from gptjax.evaluation.score import Score, Scorer, model_inputs

__all__ = ['Score', 'Scorer', 'model_inputs']
