"""What a group of `RowAdamW` may say: numbers in range, and settings that its tables can be trained with."""

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peerlm.ops import row_updates
from peerlm.ops.row_formats import EIGHT_BIT_DTYPES
from peerlm.ops.row_shards import shard_of
from peerlm.optim import muon
from peerlm.optim.catch_up import check_betas
from peerlm.optim.restrict import is_held
from peerlm.optim.table_state import second_moments


def check_group(group: dict[str, Any], *, wait: bool = True) -> None:
    """Raise ValueError where the numbers of a group are out of range or do not go together.

    Unless told to wait for it, a learning rate on a device is not looked at.
    """
    beta1, beta2 = group["betas"]
    lr = float(group["lr"]) if wait or not _is_on_device(group["lr"]) else 0.0
    for name, value, right in (
        ("lr", lr, lr >= 0),
        ("betas", (beta1, beta2), 0 <= beta1 < 1 and 0 <= beta2 < 1),
        ("eps", group["eps"], group["eps"] >= 0),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0),
    ):
        if not right:
            raise ValueError(f"{name} = {value} is out of range: lr, eps and weight_decay >= 0, 0 <= betas < 1")
    if group.get("name") == muon.GROUP:
        _check_muon(group)
    if not group["rows"]:
        return
    if group["state_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"state_dtype = {group['state_dtype']}: tables keep moments in torch.float32 or torch.bfloat16"
        )
    for parameter in group["params"]:
        if group["row_wise"]:
            second_moments(parameter, group["row_wise"])
            _check_columns(parameter, group["row_wise"])
        if is_dtensor(parameter):
            raise ValueError(
                f"a table {tuple(parameter.shape)} is a DTensor, as FSDP2 makes them, which RowAdamW cannot train: "
                "take DistributedDataParallel, or torch.optim.AdamW"
            )
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, *EIGHT_BIT_DTYPES):
            taken = "float32, float64, bfloat16, int8 or float8_e4m3fn"
            raise ValueError(f"a table has dtype {parameter.dtype}: tables are {taken}")
        if group["fused"] and is_held(parameter):
            raise ValueError(
                "fused=True updates rows in the backward pass, frozen (freeze_grown) or not: use fused=False"
            )
        shard = shard_of(parameter)
        if group["fused"] and shard is not None and shard.copies > 1:
            raise ValueError(
                f"fused=True updates rows before the gradients of the {shard.copies} copies of a sharded table are "
                "averaged: use fused=False, or replica = 1"
            )
        if parameter.dtype in EIGHT_BIT_DTYPES and not group["fused"]:
            raise ValueError(f"a table in {parameter.dtype} has no gradient: pass fused=True, which needs none")
        if parameter.dtype in EIGHT_BIT_DTYPES and row_updates.is_shared(parameter):
            raise ValueError(
                f"a table in {parameter.dtype} has no gradient that layers which share it could add to: take float32 "
                "or bfloat16 rows, or a table for each layer"
            )
        if group["lazy"] or beta1 == 0:
            continue
        if parameter.dtype in EIGHT_BIT_DTYPES or torch.bfloat16 in (parameter.dtype, group["state_dtype"]):
            raise ValueError(
                "weights equal to dense AdamW's need tables and moments in float32 (got a table in "
                f"{parameter.dtype}, state_dtype = {group['state_dtype']}): pass lazy=True, or betas with beta1 = 0"
            )
        if group["eps"] == 0:
            raise ValueError("eps = 0: rows can only catch up with eps > 0, or pass lazy=True")
        check_betas(beta1, beta2)


def check_fused(within_ddp: bool) -> None:
    """Raise RuntimeError, or warn, where rows would be updated before the gradients of other ranks are there."""
    if within_ddp:
        raise RuntimeError("fused=True cannot wait for the gradients of other ranks: use fused=False")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            "fused=True updates tables by the gradients of this rank alone: if ranks train one model together, "
            "use DistributedDataParallel and fused=False",
            stacklevel=2,
        )


def _is_on_device(rate: object) -> bool:
    """Whether a learning rate is a tensor that is not on the CPU."""
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP2 or another parallelism of PyTorch's has cut this tensor over ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _check_columns(parameter: Tensor, row_wise: bool | int) -> None:
    """Raise ValueError where the mean over a row would need the columns of other ranks."""
    shard = shard_of(parameter)
    if row_wise is True and shard is not None and parameter.shape[-1] != shard.width:
        raise ValueError(
            f"row_wise = True: this rank has {parameter.shape[-1]} of a table's {shard.width} columns, and a row's "
            "mean needs all: take row_wise=128, one second moment per row and 128 columns"
        )


def _check_muon(group: dict[str, Any]) -> None:
    """Raise ValueError where a group asks for Muon and cannot have it."""
    if not 0 <= group.setdefault("momentum", 0.95) < 1:
        raise ValueError(f"momentum = {group['momentum']} is out of range: 0 <= momentum < 1")
    for parameter in group["params"]:
        if not muon.takes(parameter):
            raise ValueError(f"Muon takes matrices and stacks of them, not a parameter {tuple(parameter.shape)}")
        if is_dtensor(parameter):
            raise ValueError(
                f"Muon needs whole matrices, and a parameter {tuple(parameter.shape)} is a DTensor, as FSDP2 makes "
                "them: take AdamW for it"
            )
