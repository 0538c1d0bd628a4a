"""Learning without forgetting: a trained model learns domain after domain."""

from peerlm.learn.config import LearnConfig, MemoryConfig, StageConfig
from peerlm.learn.stream import learn, markdown_matrix

__all__ = ["LearnConfig", "MemoryConfig", "StageConfig", "learn", "markdown_matrix"]
