"""Learning without forgetting: a trained model learns domain after domain."""

from peerlm.continual.config import LearnConfig, MemoryConfig, StageConfig
from peerlm.continual.stream import learn, markdown_matrix

__all__ = ["LearnConfig", "MemoryConfig", "StageConfig", "learn", "markdown_matrix"]
