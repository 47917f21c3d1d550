"""Evaluation of trained models: scores on documents that were not trained on, and on tasks of the lm-evaluation-harness.

The modules `harness` and `tasks` are not imported here, since they need the lm_eval package.
"""

from gptjax.evaluation.classes import class_baselines, class_table, draw_confusion
from gptjax.evaluation.likelihood import LikelihoodScorer, Request
from gptjax.evaluation.results import ALL_SETS, documents, draw, record, table
from gptjax.evaluation.score import Score, Scorer, Scores, pooled, score_of_examples
from gptjax.evaluation.sets import choose_sets
