"""This process among those that train together: under torchrun, or within DistributedDataParallel."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from peerlm.errors import RankLost, UserError
from peerlm.files import PARTIAL, atomic_folder, is_disk_full

_FAILED = "peerlm/failed"
"""Key of the ranks' store under which those that end early are counted."""
MEETING = "PEERLM_MEETING"
"""Environment variable that names what processes meet for, where some of torchrun's meet more than once."""
_FILES_TIMEOUT = timedelta(days=1)
"""How long ranks wait for each other where one prepares data or writes files."""
_failures: "dist.Store | None" = None
"""Where the ranks count those that end early; None: this process is alone."""
_first_to_fail: bool | None = None
"""Whether no other rank ended early before this one; None: this one has not."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who we are, where we compute, and the few things that processes tell each other."""

    rank: int
    """Number of this process, 0 to world_size - 1; 0 writes the run's files."""
    world_size: int
    """Processes that train together."""
    device: torch.device
    """Where this one computes."""
    files: "dist.ProcessGroup | None" = None
    """Group of all ranks for tensors on the CPU, with a long timeout, for what comes with files; None: the default
    group."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a scalar over the processes, float64, on its device; each must call it."""
        total = value.detach().double().clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total / self.world_size

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes, in place; each must call it."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def of_main(self, value: float) -> float:
        """The value that process 0 gives; each must call it."""
        if self.world_size == 1:
            return value
        given = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(given, src=0)
        return given.item()

    def any(self, flag: bool) -> bool:
        """Whether any process gives True; each must call it."""
        if self.world_size == 1:
            return flag
        raised = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            dist.barrier(group=self.files)

    def new_files_group(self) -> "dist.ProcessGroup | None":
        """One more group like `files`, for another thread; each rank must call it."""
        return _new_files_group() if self.world_size > 1 else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context whose end no rank passes unless all of them get there; each must enter it, and wait for none within.

        Where it fails on a rank, all raise: that rank its exception, the others one with the same sentence. That is a
        UserError for a UserError, an OSError for a full disk, RankLost for anything else.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        if self.world_size > 1:
            said: list[tuple[str, str] | None] = [None] * self.world_size
            try:
                dist.all_gather_object(said, None if error is None else _said(error), group=self.files)
            except RuntimeError:
                if error is None:
                    raise
            if error is None and any(said):
                raise _repeated(next((rank, *each) for rank, each in enumerate(said) if each))
        if error is not None:
            raise error

    @contextmanager
    def atomic_folder(self, folder: Path) -> Iterator[Path]:
        """As of `peerlm.files`, a folder that all ranks write into; each must enter it, and fails where any fails."""
        with ExitStack() as stack:
            with self.together():
                if self.is_main:
                    stack.enter_context(atomic_folder(folder))
            yield folder.with_name(PARTIAL + folder.name)
            with self.together():
                stack.close()


def _new_files_group() -> "dist.ProcessGroup":
    return dist.new_group(backend="gloo", timeout=_FILES_TIMEOUT)


ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
"""A process that trains by itself."""


def _said(error: Exception) -> tuple[str, str]:
    """What other ranks are told of an exception: its kind, and a sentence."""
    kind = "full" if is_disk_full(error) else "mistake" if isinstance(error, UserError) else type(error).__name__
    return kind, str(error)


def _repeated(told: tuple[int, str, str]) -> Exception:
    """The exception for what another rank has told."""
    rank, kind, sentence = told
    if kind == "full":
        return OSError(errno.ENOSPC, sentence)
    if kind == "mistake":
        return UserError(sentence)
    return RankLost(f"process {rank} of the run failed with {kind}: {sentence}")


def ddp_group() -> "dist.ProcessGroup | None":
    """The ranks of the DistributedDataParallel whose forward pass is under way; None outside of one."""
    active = DistributedDataParallel._get_active_ddp_module()
    return None if active is None else active.process_group


def inside_backward() -> bool:
    """Whether autograd is at work: gradient checkpointing then repeats a forward pass, outside of `ddp_group`.

    torch.compile, which cannot ask, traces forward passes alone.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def automatic_device() -> torch.device:
    """The device that is meant by "auto": this process's CUDA device where there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def join_ranks(device: str, *, always: bool = False) -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo on CPU, NCCL on CUDA) and leave them at the end.

    After an exception the process groups stay: to destroy them can wait without end for ranks that have failed. Such a
    process should end by `end_process`, and say why only where `is_first_to_fail`.

    device: "auto" (CUDA where there is one), "cpu" or "cuda"; UserError for "cuda" on a machine without.
    always: whether a process alone is a group, too. Raises RankLost where another rank cannot be reached any more.
    """
    global _failures
    local = torch.device("cpu") if device == "cpu" else automatic_device()
    if device == "cuda" and local.type != "cuda":
        raise UserError("device = 'cuda': PyTorch finds no CUDA device on this machine; set device to 'cpu' or 'auto'")
    if local.type == "cuda":
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if always:
            backend = "nccl" if local.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield Ranks(rank=0, world_size=1, device=local)
        if always:
            dist.destroy_process_group()
        return
    store, rank, world_size = next(iter(rendezvous("env://")))
    store = dist.PrefixStore(os.environ.get(MEETING, "run"), store)
    _failures = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        dist.init_process_group(
            "nccl" if local.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size
        )
        yield Ranks(rank=rank, world_size=world_size, device=local, files=_new_files_group())
    except BaseException as error:
        note_failure()
        if _lost_connection(error):
            raise RankLost("another process of the run ended or was killed") from error
        raise
    _failures = None
    dist.destroy_process_group()


def note_failure() -> None:
    """Count this process among those that end early, for `is_first_to_fail` and for `has_failed` of the others."""
    global _first_to_fail
    if _failures is not None and _first_to_fail is None:
        try:
            _first_to_fail = _failures.add(_FAILED, 1) == 1
        except RuntimeError:  # the process that has the store is gone: nobody knows who was first
            _first_to_fail = True


def is_first_to_fail() -> bool:
    """Whether no other rank that ended early was counted before this process; so it is the one to say why."""
    return _first_to_fail is not False


def has_failed() -> bool:
    """Whether a rank has ended early."""
    try:
        return _failures is not None and _failures.add(_FAILED, 0) > 0
    except RuntimeError:
        return True


def end_process(exit_code: int) -> NoReturn:
    """End this process, at once where it has not left the other ranks: their groups could keep it."""
    if _failures is None:
        sys.exit(exit_code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code)


def _lost_connection(error: BaseException) -> bool:
    """Whether an exception says that other ranks do not answer; gloo's are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
