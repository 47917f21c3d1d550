"""The evaluation room: scores of a model over documents that it was not trained on, and over tasks.

The modules `harness` and `tasks` are imported by who needs them: they need the lm_eval package.
"""

from gptjax.evaluation.likelihood import Asked, Likelihood, LikelihoodScorer
from gptjax.evaluation.picture import draw
from gptjax.evaluation.results import Record, record, table
from gptjax.evaluation.score import Score, Scorer, Scores, pooled
from gptjax.evaluation.sets import choose_sets

__all__ = [
  'Asked', 'Likelihood', 'LikelihoodScorer', 'Record', 'Score', 'Scorer', 'Scores', 'choose_sets', 'draw', 'pooled', 'record', 'table',
]
