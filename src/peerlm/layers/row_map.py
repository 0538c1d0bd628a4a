"""Maps into the width of rows and out of it, for experts that are narrower than the model."""

from torch import nn


def row_map(from_dim: int, to_dim: int) -> nn.Module:
    """A linear map without bias that all experts of a layer share; without parameters where the widths are equal.

    Entries are N(0, 1 / from_dim), so that a vector keeps its mean square on the average over maps. What goes into the
    experts and what comes out of the layer is therefore of the scale that `output_scale.py` says, whatever the widths.
    """
    return nn.Identity() if from_dim == to_dim else RowMap(from_dim, to_dim)


class RowMap(nn.Linear):
    """See `row_map`."""

    def __init__(self, from_dim: int, to_dim: int):
        super().__init__(from_dim, to_dim, bias=False)

    def reset_parameters(self) -> None:
        """N(0, 1 / from_dim)."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
