"""Growth and freezing: new experts learn, the old ones are frozen."""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from peerlm.continual.method import Method, Stage, check_rows, peer_layers, train_with_fixed_statistics
from peerlm.errors import UserError
from peerlm.growth import grow, set_opening, to_shells
from peerlm.growth.freezing import PARTS, freeze_grown


@dataclass(frozen=True, kw_only=True)
class Grown(Method):
    """Give all PEER layers more experts in each stage (`peerlm.growth.grow`), and hold what was there before.

    New experts begin without effect, v zero, but where they are retrieved they take weight from the old ones: what
    they do to other text is for the divergence on earlier text to undo.
    """

    sub_keys: int = 32
    """Sub-keys that each half gains: from n * n experts to (n + sub_keys)^2."""
    frozen: tuple[str, ...] = PARTS
    """What is held: of "rows", old experts, "keys", old sub-keys, "query", and "rest", all outside of these layers."""

    @property
    def needs_experts(self) -> bool:
        """It does."""
        return True

    def prepare(self, model: PreTrainedModel, stage: Stage) -> nn.Module:
        """Grow, open and freeze; a model of pairing "row-major" is renumbered first."""
        check_rows(model)
        old = {layer.experts.num_experts for layer in peer_layers(model).values()}
        if len(old) > 1:
            raise UserError(f"the PEER layers have {sorted(old)} experts; method grow needs as many in each")
        (before,) = old
        try:
            to_shells(model)
            grow(model, (math.isqrt(before) + self.sub_keys) ** 2, seed=stage.seed)
            set_opening(model, 1.0)
            freeze_grown(model, self.frozen, before=before)
        except ValueError as error:
            raise UserError(f"the model cannot grow so: {error}") from error
        return model

    def train_mode(self, model: nn.Module) -> None:
        """Query norms keep their statistics."""
        train_with_fixed_statistics(model)
