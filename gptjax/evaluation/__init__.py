"""The evaluation room: scores of a model over documents that it was not trained on, and over tasks."""

from gptjax.evaluation.likelihood import Asked, Likelihood, LikelihoodScorer
from gptjax.evaluation.score import Score, Scorer, Scores, pooled

__all__ = ['Asked', 'Likelihood', 'LikelihoodScorer', 'Score', 'Scorer', 'Scores', 'pooled']
