"""How many of a layer's neurons an index retrieves for each token, which may change at any time."""

from torch import nn

from peerlm.layers.checks import check_sizes


class RetrievingNeurons(nn.Module):
    """An index with `num_experts` neurons, set before `retrieved`."""

    num_experts: int

    @property
    def retrieved(self) -> int:
        """K, neurons that a token retrieves, 1 to `num_experts`."""
        return self._retrieved

    @retrieved.setter
    def retrieved(self, number: int) -> None:
        check_sizes(retrieved=number)
        if number > self.num_experts:
            raise ValueError(f"retrieved is {number}, more than the {self.num_experts} neurons that there are")
        self._retrieved = number
