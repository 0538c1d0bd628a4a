"""A budget in steps, tokens, FLOPs or minutes, as whole steps or seconds."""

from dataclasses import dataclass

from peerlm.errors import UserError
from peerlm.train.config import BudgetConfig


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a run ends: after a number of steps, or of seconds."""

    limit: float
    """Optimizer steps, or seconds of wall-clock time in them."""
    in_seconds: bool
    """Which of the two."""

    @classmethod
    def plan(cls, config: BudgetConfig, *, tokens_per_step: int, flops_per_token: float) -> "Budget":
        """The whole steps, or seconds, that `config` allows; UserError when not one step fits."""
        if config.minutes is not None:
            return cls(limit=60 * config.minutes, in_seconds=True)
        if config.tokens is not None:
            name, allowed, per_step = "tokens", float(config.tokens), float(tokens_per_step)
        elif config.flops is not None:
            name, allowed, per_step = "flops", config.flops, tokens_per_step * flops_per_token
        else:
            name, allowed, per_step = "steps", float(config.steps or 0), 1.0
        if allowed < per_step:
            raise UserError(
                f"budget.{name} = {allowed:g} is less than one step, which takes {per_step:g}: raise it, "
                "or lower data.batch_size"
            )
        return cls(limit=allowed // per_step, in_seconds=False)

    def reached(self, step: int, seconds: float) -> bool:
        """Whether a run that took `step` steps in `seconds` is at its end."""
        return (seconds if self.in_seconds else step) >= self.limit

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent, 0 to 1, after `step` steps in `seconds`."""
        return min((seconds if self.in_seconds else step) / self.limit, 1.0)

    def next_progress(self, step: int, seconds: float) -> float:
        """Share that will be spent after the next step, which sets its learning rate.

        For a budget of time, a step is taken to last as long as the mean step so far.
        """
        return self.progress(step + 1, seconds * (step + 1) / step if step else 0.0)
