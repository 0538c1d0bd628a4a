"""What a backend is: a module with the functions of this protocol, and an entry in `api.py`'s table."""

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """The functions of a backend's module; arguments are those of `api`'s functions of the same names.

    An operation that a module has not is taken from the next module of its entry in the table. A module whose
    `automatic` is False is taken by name alone, never by "auto". One with a `device_type` is what tensors there are
    best computed by: where "auto" takes another, it says why.
    """

    @staticmethod
    def description() -> str:
        """What it is, or why it is not available, in one phrase."""

    @staticmethod
    def unavailable() -> str:
        """Why it cannot run on this machine; empty where it can. A constant, also to torch.compile."""

    @staticmethod
    def unsupported(
        op: str,
        *inputs: Tensor,
        ids: Tensor | None = None,
        rows: Tensor | None = None,
        scales: Tensor | None = None,
        row_gradients: bool = False,
    ) -> str:
        """Why it cannot compute `op` (an operation's name) of these arguments; empty where it can.

        inputs are x and weights, or query and sub-keys.
        """

    @staticmethod
    def linear(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
        """As `api.linear`."""

    @staticmethod
    def retrieve(
        query_THX: Tensor, sub_keys_2HnC: Tensor, k: int, weighting: str, pairing: str
    ) -> tuple[Tensor, Tensor]:
        """As `api.retrieve`."""

    @staticmethod
    def mix_experts(
        x_TD: Tensor,
        weights_TP: Tensor,
        ids_TP: Tensor,
        rows_NRD: Tensor,
        scales_NR: Tensor | None,
        activation: str,
        *,
        row_gradients: bool = False,
    ) -> Tensor:
        """As `api.mix_experts`."""

    @staticmethod
    def mix_values(weights_TP: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
        """As `api.mix_values`."""

    @staticmethod
    def dot_values(x_TD: Tensor, ids_TP: Tensor, values_ND: Tensor, *, row_gradients: bool = False) -> Tensor:
        """As `api.dot_values`."""
