"""A table whose rows lie in two pieces: what a mapped or sharded table does, as small as can be."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peerlm.layers.table import Index, Replaced, Table
from peerlm.ops.row_updates import look_up


class TwoPieces(Table):
    """The first half of the rows is one parameter, the second another; state dicts have them as one."""

    parameter_roles: ClassVar[dict[str, str]] = {"first_rows": "table", "last_rows": "table"}
    first_rows: nn.Parameter
    last_rows: nn.Parameter

    def _keep(self, rows: Tensor, *, trained: bool = True) -> None:
        cut = (len(rows) + 1) // 2
        for name, piece in (("first_rows", rows[:cut]), ("last_rows", rows[cut:])):
            setattr(self, name, nn.Parameter(piece.clone(), requires_grad=trained and rows.dtype.itemsize > 1))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `nn.Module`; transformers sets what it has loaded by the names of the state dict."""
        if name != "rows" or param is None:
            super().register_parameter(name, param)
            return
        self._keep(param.detach(), trained=param.requires_grad)
        for piece in self.row_parameters():
            piece._is_hf_initialized = getattr(param, "_is_hf_initialized", False)

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        """The whole, for tests that look at it."""
        return torch.cat(self.row_parameters())

    def parts(self) -> list[tuple[nn.Parameter, Index]]:
        cut = len(self.first_rows)
        return [(self.first_rows, slice(0, cut)), (self.last_rows, slice(cut, cut + len(self.last_rows)))]

    def _looked_up(self, ids: Tensor | None, compute: Callable[[Tensor, bool], Tensor]) -> Tensor:
        cut = len(self.first_rows)
        first_ids, last_ids = (None, None) if ids is None else (ids[ids < cut], ids[ids >= cut] - cut)

        def join(first: Tensor, last: Tensor, row_gradients: bool) -> Tensor:
            return compute(_Joined.apply(first, last) if row_gradients else torch.cat([first, last]), row_gradients)

        return look_up(
            self.first_rows,
            first_ids,
            lambda first, row_gradients: look_up(
                self.last_rows, last_ids, lambda last, _: join(first, last, row_gradients)
            ),
        )

    def _overwrite(self, first: int, vector: int | None, values: Tensor) -> None:
        cut, last = len(self.first_rows), first + len(values)
        for piece, start in ((self.first_rows, 0), (self.last_rows, cut)):
            begin, end = max(first, start), min(last, start + len(piece))
            if begin < end:
                target = piece[begin - start : end - start]
                (target if vector is None else target[:, vector]).copy_(values[begin - first : end - first])

    def _fill(self, draw: Callable[[Tensor], object]) -> None:
        rows = torch.empty(
            self.num_rows, *self.row_shape, dtype=None if self.scales is not None else self.dtype, device=self.device
        )
        draw(rows)
        self.write(rows)

    def _replace(self, change: Callable[[Tensor, float], Tensor]) -> Replaced:
        old = self.row_parameters()

        def carry(tensors: list[Tensor], value: float) -> list[Tensor]:
            whole = change(torch.cat([tensor.detach() for tensor in tensors]), value)
            cut = (len(whole) + 1) // 2
            return [whole[:cut].clone(), whole[cut:].clone()]

        first, second = carry(list(old), 0.0)
        self.first_rows = nn.Parameter(first, requires_grad=old[0].requires_grad)
        self.last_rows = nn.Parameter(second, requires_grad=old[0].requires_grad)
        return Replaced(old=old, new=self.row_parameters(), carry=carry)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        pieces = [destination.pop(prefix + name, None) for name in self.parameter_roles]
        if pieces[0] is not None:
            others = {name: destination.pop(name) for name in (prefix + "scales",) if name in destination}
            destination[prefix + "rows"] = torch.cat(pieces)
            destination.update(others)

    def _load_rows(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        rows = state_dict.pop(prefix + "rows", None)
        if rows is None:
            arguments[2].append(prefix + "rows")
        elif rows.shape != (self.num_rows, *self.first_rows.shape[1:]):
            arguments[4].append(
                f"size mismatch for {prefix}rows: copying a param with shape {rows.shape} from checkpoint, the shape "
                f"in current model is {torch.Size([self.num_rows, *self.first_rows.shape[1:]])}."
            )
            return
        else:
            cut = len(self.first_rows)
            state_dict[prefix + "first_rows"], state_dict[prefix + "last_rows"] = rows[:cut], rows[cut:]
        super()._load_rows(state_dict, prefix, *arguments)
        for name in self.parameter_roles:
            state_dict.pop(prefix + name, None)


class _Joined(torch.autograd.Function):
    """The pieces one after another; a sparse gradient of the whole becomes one for each piece."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.shapes = first.shape, second.shape
        return torch.cat([first, second])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        found, start = [], 0
        ids, values = gradient._indices()[0], gradient._values()
        for shape in ctx.shapes:
            own = (ids >= start) & (ids < start + shape[0])
            found.append(torch.sparse_coo_tensor(ids[own][None] - start, values[own], shape, check_invariants=False))
            start += shape[0]
        return tuple(found)
