"""Every way by which rows leave a layer that RowAdamW trains: they have caught up, or that is refused."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load, load_file, save, save_file, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.nn.utils import get_total_norm, parameters_to_vector, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from peerlm import PEER, PeerConfig, PeerForCausalLM
from peerlm.ops.row_updates import rows_as_they_are
from peerlm.optim import RowAdamW, clip_gradients, parameter_groups
from peerlm.optim.row_adamw import _Watcher

pytestmark = pytest.mark.whole_tables("reads the parameter of a table")
DIM, EXPERTS = 8, 256
BATCHES = [torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed)) for seed in range(24)]


def new_layer() -> PEER:
    torch.manual_seed(0)
    return PEER(DIM, num_experts=EXPERTS, heads=1, experts_per_head=3, key_dim=4, query_norm="layer")


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    dtype = next(layer.parameters()).dtype
    for x in batches:
        optimizer.zero_grad()
        layer(x.to(dtype)).square().mean().backward()
        optimizer.step()


def trained(steps: int = 12, **settings: Any) -> tuple[PEER, RowAdamW]:
    layer = new_layer()
    optimizer = RowAdamW(parameter_groups(layer), lr=0.01, **settings)
    train(layer, optimizer, BATCHES[:steps])
    return layer, optimizer


def as_stored(rows: Tensor) -> Tensor:
    with rows_as_they_are():
        return rows.detach().clone()


@pytest.fixture(scope="module")
def right() -> Tensor:
    layer, optimizer = trained()
    behind = as_stored(layer.experts.rows)
    optimizer.catch_up()
    up_to_date = as_stored(layer.experts.rows)
    assert (behind != up_to_date).flatten(1).any(dim=1).sum() > 20
    return up_to_date


def among_parameters(layer: nn.Module, values: Any) -> Tensor:
    """What belongs to the rows in a list like `layer.parameters()`."""
    return dict(zip(dict(layer.named_parameters()), values, strict=True))["experts.rows"]


def through_file(thing: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


def parts_of_vector(layer: nn.Module) -> list[Tensor]:
    parameters = list(layer.parameters())
    parts = parameters_to_vector(parameters).split([p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def averaged(layer: nn.Module, **options: Any) -> Tensor:
    average = AveragedModel(new_layer(), **options)
    for _ in range(2):
        average.update_parameters(layer)
    return average.module.experts.rows


def moved_by(optimizer: torch.optim.Optimizer, layer: PEER) -> Tensor:
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return layer.experts.rows


def seen_by_hook(layer: PEER, register: Callable[[Callable[..., None]], Any]) -> Tensor:
    seen: list[Tensor] = []
    register(lambda *arguments: seen.append(layer.experts.rows.detach().clone()))
    layer(BATCHES[0]).sum().backward()
    return seen[0]


def tied(layer: PEER) -> Tensor:
    head = nn.Linear(DIM, 2 * EXPERTS, bias=False)
    holder = nn.Module()
    holder.rows = layer.experts.rows
    head.weight = nn.Parameter(holder.rows.flatten(0, 1))
    assert torch.equal(torch.einsum("d,nvd->nv", torch.ones(DIM), holder.rows), head(torch.ones(DIM)).view(EXPERTS, 2))
    return head.weight.view(EXPERTS, 2, DIM)


def called_functionally(layer: PEER, parameters: dict[str, Tensor]) -> Tensor:
    y = torch.func.functional_call(layer, parameters, (BATCHES[0],))
    assert torch.equal(y, copy.deepcopy(layer)(BATCHES[0]))
    return parameters["experts.rows"]


def pruned(layer: PEER) -> Tensor:
    prune.identity(layer.experts, "rows")
    layer(BATCHES[0])
    return layer.experts.rows


def quantised(layer: PEER) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}).experts.rows


def in_int8(layer: PEER) -> Tensor:
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        each.experts.convert_rows("int8")
    assert torch.equal(layer.experts.rows, twin.experts.rows)
    return twin.experts.rows * twin.experts.scales[..., None]


def through_safetensors(write: Callable[[Path], Any], folder: Path, name: str = "rows") -> Tensor:
    write(folder / "file")
    return load_file(folder / "file")[name]


def through_dcp(layer: PEER, folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": layer.state_dict()}, checkpoint_id=folder, no_dist=True)
        state = {"model": {name: torch.zeros_like(value) for name, value in new_layer().state_dict().items()}}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"]["experts.rows"]


def loaded(layer: PEER, load: Callable[[PEER], object]) -> Tensor:
    """Rows of another layer in training, after these have been put in their place."""
    other, optimizer = trained(5)
    load(other)
    optimizer.catch_up()
    return other.experts.rows


@torch.no_grad()
def copied_into(other: PEER, layer: PEER) -> None:
    for target, source in zip(other.parameters(), layer.parameters(), strict=True):
        target.copy_(source)


Way = Callable[[PEER, RowAdamW, Path], Tensor]
WAYS: dict[str, Way] = {
    "read as an attribute": lambda layer, optimizer, folder: layer.experts.rows * 1,
    "read one by one": lambda layer, optimizer, folder: torch.stack([layer.experts.rows[i] for i in range(EXPERTS)]),
    "read through Table": lambda layer, optimizer, folder: layer.experts.read(),
    "gathered": lambda layer, optimizer, folder: layer.experts.gather(torch.arange(EXPERTS)),
    "down and up": lambda layer, optimizer, folder: torch.stack([layer.experts.down, layer.experts.up], dim=1),
    ".data": lambda layer, optimizer, folder: layer.experts.rows.data.clone(),
    "numpy": lambda layer, optimizer, folder: torch.tensor(layer.experts.rows.detach().numpy()),
    "DLPack": lambda layer, optimizer, folder: torch.from_dlpack(layer.experts.rows.detach()),
    "copy.copy": lambda layer, optimizer, folder: copy.copy(layer).experts.rows * 1,
    "copy.deepcopy": lambda layer, optimizer, folder: copy.deepcopy(layer).experts.rows,
    "copy.deepcopy of parameters": lambda layer, optimizer, folder: among_parameters(
        layer, copy.deepcopy(list(layer.parameters()))
    ),
    "copy.deepcopy of both": lambda layer, optimizer, folder: copy.deepcopy((layer, optimizer))[0].experts.rows,
    "copy.deepcopy of both, optimizer first": lambda layer, optimizer, folder: (
        copy.deepcopy((optimizer, layer))[1].experts.rows
    ),
    "pickle": lambda layer, optimizer, folder: pickle.loads(pickle.dumps(layer)).experts.rows,
    "pickle of both, optimizer first": lambda layer, optimizer, folder: (
        pickle.loads(pickle.dumps((optimizer, layer)))[1].experts.rows
    ),
    "sent to another process": lambda layer, optimizer, folder: pickle.loads(ForkingPickler.dumps(layer.experts.rows)),
    "torch.save of a module": lambda layer, optimizer, folder: through_file(layer, weights_only=False).experts.rows,
    "torch.save of a parameter": lambda layer, optimizer, folder: through_file(layer.experts.rows),
    "state_dict": lambda layer, optimizer, folder: through_file(layer.state_dict())["experts.rows"],
    "state_dict, keep_vars": lambda layer, optimizer, folder: through_file(layer.state_dict(keep_vars=True))[
        "experts.rows"
    ],
    "eval": lambda layer, optimizer, folder: as_stored(layer.eval().experts.rows),
    "AveragedModel of a layer": lambda layer, optimizer, folder: AveragedModel(layer).module.experts.rows,
    "AveragedModel.update_parameters": lambda layer, optimizer, folder: averaged(layer),
    "exponential moving average": lambda layer, optimizer, folder: averaged(
        layer, multi_avg_fn=get_ema_multi_avg_fn(0.0)
    ),
    "average by hand": lambda layer, optimizer, folder: among_parameters(
        layer, [torch.zeros_like(p).lerp_(p.detach(), 1.0) for p in layer.parameters()]
    ),
    "foreach functions": lambda layer, optimizer, folder: among_parameters(
        layer, torch._foreach_mul(list(layer.parameters()), 1.0)
    ),
    "another optimizer": lambda layer, optimizer, folder: moved_by(torch.optim.SGD(layer.parameters(), lr=0.1), layer),
    "another RowAdamW": lambda layer, optimizer, folder: moved_by(RowAdamW(parameter_groups(layer), lr=0.0), layer),
    "parameters_to_vector": lambda layer, optimizer, folder: among_parameters(layer, parts_of_vector(layer)),
    "vector_to_parameters": lambda layer, optimizer, folder: loaded(
        layer, lambda other: vector_to_parameters(parameters_to_vector(layer.parameters()), other.parameters())
    ),
    "load_state_dict": lambda layer, optimizer, folder: loaded(
        layer, lambda other: other.load_state_dict(layer.state_dict())
    ),
    "copy_ of parameters": lambda layer, optimizer, folder: loaded(layer, lambda other: copied_into(other, layer)),
    "functional_call": lambda layer, optimizer, folder: called_functionally(layer, dict(layer.named_parameters())),
    "functional_call, detached": lambda layer, optimizer, folder: called_functionally(
        layer, {name: parameter.detach() for name, parameter in layer.named_parameters()}
    ),
    "stack_module_state": lambda layer, optimizer, folder: torch.func.stack_module_state([layer])[0]["experts.rows"][0],
    "to a device": lambda layer, optimizer, folder: layer.to("cpu").experts.rows,
    "double": lambda layer, optimizer, folder: as_stored(layer.double().experts.rows).float(),
    "half and back": lambda layer, optimizer, folder: layer.half().experts.rows.float(),
    "forward hook": lambda layer, optimizer, folder: seen_by_hook(layer, layer.register_forward_hook),
    "hook of a gradient": lambda layer, optimizer, folder: seen_by_hook(
        layer, layer.experts.rows.register_post_accumulate_grad_hook
    ),
    "tied to another layer": lambda layer, optimizer, folder: tied(layer),
    "pruned": lambda layer, optimizer, folder: pruned(layer),
    "dynamic quantisation": lambda layer, optimizer, folder: quantised(layer),
    "int8 rows": lambda layer, optimizer, folder: in_int8(layer),
    "safetensors save_model": lambda layer, optimizer, folder: through_safetensors(
        lambda path: save_model(layer, str(path)), folder, "experts.rows"
    ),
    "safetensors save_file": lambda layer, optimizer, folder: through_safetensors(
        lambda path: save_file({"rows": layer.experts.rows}, path), folder
    ),
    "safetensors save of .data": lambda layer, optimizer, folder: load(save({"rows": layer.experts.rows.data}))["rows"],
    "DCP get_model_state_dict": lambda layer, optimizer, folder: get_model_state_dict(layer)["experts.rows"],
    "DCP get_model_state_dict, whole on a CPU": lambda layer, optimizer, folder: get_model_state_dict(
        layer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )["experts.rows"],
    "DCP get_state_dict": lambda layer, optimizer, folder: get_state_dict(layer, optimizer)[0]["experts.rows"],
    "DCP save": lambda layer, optimizer, folder: through_dcp(layer, folder),
    "torch.export": lambda layer, optimizer, folder: as_stored(exported(layer).state_dict["experts.rows"]),
    "torch.export, saved": lambda layer, optimizer, folder: export_saved(layer),
    "torch.jit.trace": lambda layer, optimizer, folder: as_stored(traced(layer).get_parameter("experts.rows")),
}


def exported(layer: PEER) -> torch.export.ExportedProgram:
    return torch.export.export(layer, (BATCHES[0],), strict=False)


def export_saved(layer: PEER) -> Tensor:
    file = io.BytesIO()
    torch.export.save(exported(layer), file)
    file.seek(0)
    return torch.export.load(file).state_dict["experts.rows"]


def traced(layer: PEER) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(layer, BATCHES[0], check_trace=False)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_leave_are_up_to_date(way: str, right: Tensor, tmp_path: Path) -> None:
    rows = as_stored(WAYS[way](*trained(), tmp_path))
    if way == "half and back":
        right = right.half().float()
    elif way == "int8 rows":
        assert (rows - right).abs().max() < 0.01 * right.abs().max()
        return
    assert torch.equal(rows, right)


REFUSED: dict[str, tuple[Callable[[PEER], object], type[Exception], str]] = {
    "share_memory": (lambda layer: layer.share_memory(), RuntimeError, "cannot be shared with other processes"),
    "share_memory_": (lambda layer: layer.experts.rows.share_memory_(), RuntimeError, r"copy.deepcopy\(layer\)"),
    "torch.func.grad": (
        lambda layer: torch.func.grad(lambda state: torch.func.functional_call(layer, state, BATCHES[0]).sum())(
            dict(layer.named_parameters())
        ),
        RuntimeError,
        r"a transform of torch.func hides which rows are read .*: give it copies",
    ),
    "DataParallel": (
        lambda layer: layer.experts._replicate_for_data_parallel(),
        RuntimeError,
        "nn.DataParallel copies tables with their stale rows.* use DistributedDataParallel",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_right_is_refused(way: str) -> None:
    leave, error, message = REFUSED[way]
    layer, _ = trained()
    layer.experts.backend = layer.product_keys.backend = "reference"  # native kernels know no transforms
    with pytest.raises(error, match=message):
        leave(layer)


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_layer_computes_with_rows_that_have_caught_up_since(training: bool) -> None:
    layer, optimizer = trained(6)
    module = exported(layer.train(training)).module()
    train(layer.train(), optimizer, BATCHES[6:18])
    x = BATCHES[0]
    with rows_as_they_are():
        behind = module(x)
    found = module(x)
    optimizer.catch_up()
    assert torch.equal(found, module(x))
    assert not torch.equal(found, behind)


def test_a_norm_is_that_of_rows_that_have_caught_up(right: Tensor) -> None:
    layer, _ = trained()
    assert torch.equal(get_total_norm([layer.experts.rows]), right.norm())


VIEWS: dict[str, Callable[[PEER], Tensor]] = {
    "detach": lambda layer: layer.experts.rows.detach(),
    "data": lambda layer: layer.experts.rows.data,
    "state_dict": lambda layer: layer.state_dict()["experts.rows"],
    "slice": lambda layer: layer.experts.rows[:],
    "view of a view": lambda layer: layer.experts.rows.flatten(1).view(EXPERTS, 2, DIM),
    "unbind": lambda layer: layer.experts.rows.unbind(1)[1],
    "read": lambda layer: layer.experts.read(),
    "up": lambda layer: layer.experts.up,
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_that_was_taken_before_shows_what_rows_became(view: str) -> None:
    (layer, optimizer), (twin, other) = trained(6), trained(6)
    taken = VIEWS[view](layer)
    twin.state_dict()
    train(layer, optimizer, BATCHES[6:18])
    train(twin, other, BATCHES[6:18])
    behind = as_stored(taken)
    other.catch_up()
    expected = VIEWS[view](twin).clone()
    assert not torch.equal(behind, expected)
    assert torch.equal(taken, expected)


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")], ids=" first, ".join)
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"row_wise": True}, {"lazy": True}], ids=str)
@pytest.mark.parametrize("kind", ["torch.save", "DCP", "DCP, flat"])
def test_a_run_resumes_with_the_same_bits_in_whatever_order_it_was_saved(
    kind: str, settings: dict[str, Any], order: tuple[str, str]
) -> None:
    layer, optimizer = trained(**settings)
    other, second = trained(3, **settings)
    options = StateDictOptions(flatten_optimizer_state_dict=kind.endswith("flat"))
    saves: dict[str, Callable[[], Any]] = {
        "model": lambda: layer.state_dict() if kind == "torch.save" else get_model_state_dict(layer),
        "optimizer": lambda: (
            optimizer.state_dict()
            if kind == "torch.save"
            else get_optimizer_state_dict(layer, optimizer, options=options)
        ),
    }
    saved = {name: through_file(saves[name](), weights_only=False) for name in order}
    if kind == "torch.save":
        other.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
    else:
        set_state_dict(
            other, second, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
        )
    for each, its in ((layer, optimizer), (other, second)):
        train(each, its, BATCHES[12:])
        its.catch_up()
    assert torch.equal(layer.experts.rows, other.experts.rows)
    assert torch.equal(layer.eval()(BATCHES[0]), other.eval()(BATCHES[0]))


def test_rows_and_state_that_are_saved_as_they_are_belong_together() -> None:
    layer, optimizer = trained()
    before = as_stored(layer.experts.rows)
    with rows_as_they_are():
        model, state = through_file(layer.state_dict()), through_file(optimizer.state_dict(), weights_only=False)
    assert torch.equal(model["experts.rows"], before)
    assert torch.equal(as_stored(layer.experts.rows), before)
    other, second = trained(3)
    other.load_state_dict(model)
    second.load_state_dict(state)
    for each, its in ((layer, optimizer), (other, second)):
        train(each, its, BATCHES[12:])
        its.catch_up()
    assert torch.equal(layer.experts.rows, other.experts.rows)


def test_a_language_model_is_saved_with_rows_that_have_caught_up(tmp_path: Path) -> None:
    peer = {"num_experts": 64, "heads": 1, "experts_per_head": 3, "key_dim": 4, "query_norm": "layer"}
    model = PeerForCausalLM(
        PeerConfig(
            vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffw_layers="peer", peer=peer
        )
    )
    optimizer = RowAdamW(model.parameters(), lr=0.01)
    for seed in range(6):
        ids = torch.randint(32, (1, 4), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    rows = model.model.layers[0].ffw.experts.rows
    behind = as_stored(rows)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")["model.layers.0.ffw.experts.rows"]
    assert not torch.equal(saved, behind)
    optimizer.catch_up()
    assert torch.equal(saved, rows)


def test_copies_are_plain_and_not_watched() -> None:
    layer, _ = trained()
    assert isinstance(layer.experts.rows, nn.Parameter)
    assert repr(layer.experts.rows) == repr(copy.deepcopy(layer.experts.rows))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), through_file(layer, weights_only=False)):
        assert type(copied.experts.rows) is nn.Parameter
        assert vars(copied.experts.rows) == {}
        assert not copied.experts.watched
        assert copied.share_memory() is copied


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that all rows were asked for."""
    seen: list[str] = []
    before_read = _Watcher.before_read

    def count(self: _Watcher, parameter: Tensor, ids: Tensor | None) -> None:
        if ids is None:
            seen.append("all rows")
        before_read(self, parameter, ids)

    monkeypatch.setattr(_Watcher, "before_read", count)
    return seen


def steps_by_hand(layer: nn.Module, optimizer: RowAdamW) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        optimizer.zero_grad(set_to_none=False)
        layer(BATCHES[0]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        clip_gradients(optimizer.param_groups, max_norm=1.0, table_max_norm=1.0)
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad and p.dtype == torch.float32) > 0
        optimizer.step()

    return step


def steps_of_accelerate(layer: nn.Module, optimizer: RowAdamW) -> Callable[[], None]:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    prepared, stepping = accelerator.prepare(layer, optimizer)

    def step() -> None:
        accelerator.backward(prepared(BATCHES[0]).square().mean())
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        stepping.step()
        stepping.zero_grad()

    return step


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("steps", [steps_by_hand, steps_of_accelerate])
def test_training_never_sweeps_a_table(
    steps: Callable[[nn.Module, RowAdamW], Callable[[], None]], backend: str, sweeps: list[str]
) -> None:
    layer, optimizer = trained(4)
    layer.experts.backend = layer.product_keys.backend = backend
    step = steps(layer, optimizer)
    sweeps.clear()
    for _ in range(3):
        step()
    assert sweeps == []
    layer.experts.rows.sum()
    assert sweeps


@pytest.mark.usefixtures("one_rank")
def test_distributed_data_parallel_never_sweeps_a_table(sweeps: list[str]) -> None:
    layer, optimizer = trained(4)
    parallel = nn.parallel.DistributedDataParallel(layer)
    assert sweeps  # ranks start alike
    sweeps.clear()
    train(parallel, optimizer, BATCHES[:3])
    assert sweeps == []
    with torch.no_grad():
        dist.broadcast(layer.experts.rows, src=0)
    assert sweeps
    del parallel


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"lazy": True}], ids=str)
def test_a_compiled_layer_trains_and_looks_rows_up_outside_of_its_graphs(
    settings: dict[str, Any], sweeps: list[str]
) -> None:
    layer, optimizer = trained(4, **settings)
    twin, other = trained(4, **settings)
    sweeps.clear()
    train(torch.compile(layer, backend="eager"), optimizer, BATCHES[4:6])
    assert sweeps == []
    train(twin, other, BATCHES[4:6])
    torch.testing.assert_close(layer.experts.read(), twin.experts.read())


def test_a_layer_that_nobody_watches_is_one_graph() -> None:
    layer = new_layer().eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(BATCHES[0]), layer(BATCHES[0]))
