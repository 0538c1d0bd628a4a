"""Learning without forgetting: a trained model learns domain after domain."""

from peerlm.continual.config import LearnConfig, RetentionConfig, StageConfig
from peerlm.continual.stream import learn, markdown_matrix

__all__ = ["LearnConfig", "RetentionConfig", "StageConfig", "learn", "markdown_matrix"]
