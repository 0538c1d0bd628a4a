"""Training runs: a recipe in, a folder with the model, its log and its checkpoints out."""

from peerlm.errors import TrainingStopped
from peerlm.train.config import (
    BudgetConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
)
from peerlm.train.recipe import load_recipe
from peerlm.train.trainer import TrainResult, train

__all__ = [
    "BudgetConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "OptimConfig",
    "TrainConfig",
    "TrainResult",
    "TrainingStopped",
    "load_recipe",
    "train",
]
