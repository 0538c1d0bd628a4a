"""A budget in steps, tokens, FLOPs or minutes, as whole steps or seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from peerlm.errors import UserError
from peerlm.train.config import BudgetConfig


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When a run ends, after a number of steps or of seconds, and which share of it is spent when."""

    limit: float
    """Optimizer steps, or seconds of wall-clock time in them."""
    in_seconds: bool
    """Which of the two."""
    changes: tuple[float, ...] = ()
    """Steps or seconds after which steps cost something else, ascending."""
    shares: tuple[float, ...] = ()
    """Which share of the budget is spent then."""

    @classmethod
    def plan(
        cls,
        config: BudgetConfig,
        *,
        tokens_per_step: int,
        flops_per_token: Sequence[float],
        shares: Sequence[float] = (),
    ) -> "Budget":
        """The whole steps, or seconds, that `config` allows.

        Args:
            config: the budget.
            tokens_per_step: tokens in an optimizer step.
            flops_per_token: at the start, and from each of `shares` on.
            shares: of the budget, ascending, at which steps begin to cost something else.

        Raises:
            UserError: not one step fits into a part of the budget.
        """
        if config.minutes is not None:
            limit = 60 * config.minutes
            changes = tuple(share * limit for share in shares)
            return cls(limit=limit, in_seconds=True, changes=changes, shares=tuple(shares))
        per_step = [1.0] * len(flops_per_token)
        if config.tokens is not None:
            name, allowed = "tokens", float(config.tokens)
            per_step = [float(tokens_per_step)] * len(flops_per_token)
        elif config.flops is not None:
            name, allowed = "flops", config.flops
            per_step = [tokens_per_step * flops for flops in flops_per_token]
        else:
            name, allowed = "steps", float(config.steps or 0)
        spent, ends = 0.0, [0.0]
        for cost, begin, end in zip(per_step, (0.0, *shares), (*shares, 1.0), strict=True):
            steps = (end * allowed - spent + 1e-9 * allowed * bool(shares)) // cost
            if steps < 1:
                where = f" from {begin:.0%} to {end:.0%}" if shares else ""
                raise UserError(
                    f"budget.{name} = {allowed:g} is less than one step{where}, which takes {cost:g}: raise it, "
                    "or lower data.batch_size"
                )
            spent += steps * cost
            ends.append(ends[-1] + steps)
        return cls(limit=ends[-1], in_seconds=False, changes=tuple(ends[1:-1]), shares=tuple(shares))

    def reached(self, step: int, seconds: float) -> bool:
        """Whether a run that took `step` steps in `seconds` is at its end."""
        return self._spent(step, seconds) >= self.limit

    def changes_due(self, step: int, seconds: float) -> int:
        """How many of `changes` are reached after `step` steps in `seconds`."""
        return sum(self._spent(step, seconds) >= change for change in self.changes)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent, 0 to 1, after `step` steps in `seconds`."""
        spent = self._spent(step, seconds)
        begin, share_begin, end, share_end = 0.0, 0.0, self.limit, 1.0
        for change, share in zip(self.changes, self.shares, strict=True):
            if spent < change:
                end, share_end = change, share
                break
            begin, share_begin = change, share
        return min(share_begin + (share_end - share_begin) * (spent - begin) / (end - begin), 1.0)

    def next_progress(self, step: int, seconds: float) -> float:
        """Share that will be spent after the next step, which sets its learning rate.

        For a budget of time, a step is taken to last as long as the mean step so far.
        """
        return self.progress(step + 1, seconds * (step + 1) / step if step else 0.0)

    def _spent(self, step: int, seconds: float) -> float:
        return seconds if self.in_seconds else step
