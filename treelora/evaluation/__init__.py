"""Scores of a model on tasks, and what they amount to over a stream. All scores are percent, 0 to 100."""

from treelora.evaluation.choice import score_choices
from treelora.evaluation.features import prompt_features
from treelora.evaluation.generate import generate_answers
from treelora.evaluation.matrix import (
    BEFORE_TRAINING,
    SCORES_SCHEMA,
    Score,
    backward_transfer,
    baseline_from_table,
    forgetting,
    forward_transfer,
    matrix_from_table,
    overall_performance,
    render_matrix,
    scores_table,
    task_names,
)
from treelora.evaluation.router import GaussianRouter
from treelora.evaluation.text_metrics import METRICS

__all__ = [
    "BEFORE_TRAINING",
    "METRICS",
    "SCORES_SCHEMA",
    "GaussianRouter",
    "Score",
    "backward_transfer",
    "baseline_from_table",
    "forgetting",
    "forward_transfer",
    "generate_answers",
    "matrix_from_table",
    "overall_performance",
    "prompt_features",
    "render_matrix",
    "score_choices",
    "scores_table",
    "task_names",
]
