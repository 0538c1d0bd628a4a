"""Layers beside each other: each maps the same input, and their outputs are summed."""

from collections.abc import Mapping

from torch import Tensor, nn


def share_of_scale(parts: int) -> float:
    """The output scale of each of so many parts, whose sum then starts at the scale of one layer alone.

    The parts write independent vectors of mean 0, so that their powers add up; each has an equal share.
    """
    return float(parts**-0.5)


class ParallelFFW(nn.Module):
    """The sum of several feed-forward layers of one input, such as PEER beside a small dense layer.

    Args:
        parts: by name, layers `module(x, mask=None) -> y` of the same width that have `reset_parameters(output_scale)`.

    Raises:
        ValueError: there are no parts, or they differ in width.
    """

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        widths = {name: part.dim for name, part in parts.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(
                f"the widths of layers beside each other are {widths}; give at least one, all of one width"
            )
        for name, part in parts.items():
            self.add_module(name, part)
        self.dim = next(iter(widths.values()))
        self.reset_parameters()

    def reset_parameters(self, output_scale: float = 1.0) -> None:
        """Each part to its `share_of_scale`, times `output_scale`."""
        parts = list(self.children())
        for part in parts:
            part.reset_parameters(output_scale=output_scale * share_of_scale(len(parts)))  # type: ignore[operator]

    @property
    def reads_tokens(self) -> int:
        """How many token ids a part needs for each token; 0 where none reads them."""
        return max([getattr(part, "reads_tokens", 0) for part in self.children()])

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Map x (..., dim) to (..., dim); the bool `mask` (...) is True at real tokens.

        tokens: (..., n) int64 for parts that read them, as of `HashedNgrams`.
        """
        outputs = [
            part(x, mask, tokens) if getattr(part, "reads_tokens", 0) else part(x, mask) for part in self.children()
        ]
        y: Tensor = outputs[0]
        for output in outputs[1:]:
            y = y + output
        return y
