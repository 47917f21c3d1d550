"""The evaluation room: scores of a model over documents that it was not trained on."""

from gptjax.evaluation.score import Score, Scorer, Scores, pooled

__all__ = ['Score', 'Scorer', 'Scores', 'pooled']
