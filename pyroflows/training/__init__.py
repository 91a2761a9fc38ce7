"""Training: one loop for every objective, and maximum likelihood by it."""

from pyroflows.training.budget import Budget
from pyroflows.training.clipping import Clip, MaxNorm, MedianNorm
from pyroflows.training.history import History, progress_bar
from pyroflows.training.likelihood import fit
from pyroflows.training.schedule import Schedule, warmup_cosine
from pyroflows.training.seeds import seeded
from pyroflows.training.states import Average, Best
from pyroflows.training.steps import Steps, make_adam

__all__ = [
    "Average",
    "Best",
    "Budget",
    "Clip",
    "History",
    "MaxNorm",
    "MedianNorm",
    "Schedule",
    "Steps",
    "fit",
    "make_adam",
    "progress_bar",
    "seeded",
    "warmup_cosine",
]
