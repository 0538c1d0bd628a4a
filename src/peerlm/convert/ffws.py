"""Find a model's dense feed-forward layers by what they compute, not by their names."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peerlm.convert.neurons.weights import Neurons
from peerlm.layers.modes import evaluating
from peerlm.ops.functions import ACTIVATIONS


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearMap:
    """A linear map of a model, or one half of it where two maps are stored as one."""

    path: str
    module: nn.Module
    """`nn.Linear`, or transformers' Conv1D, whose weight is transposed."""
    half: int | None = None
    """0 or 1: which half of the outputs; None for all."""

    @property
    def weight(self) -> Tensor:
        """(out, in): a view of the model's weight."""
        weight: Any = self.module.weight
        return self._part(weight.T if isinstance(self.module, Conv1D) else weight)

    @property
    def bias(self) -> Tensor | None:
        """(out,), or None."""
        bias: Any = self.module.bias
        return None if bias is None else self._part(bias)

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self.half is None else tensor.detach().chunk(2)[self.half]


@dataclass(frozen=True, eq=False, kw_only=True)
class FFW:
    """A dense feed-forward layer of a model: act(x W + b) V + c, or (x W + b) act(x G + d) V + c if gated."""

    path: str
    """Of the module that is the layer; of the map V, where the layer is spread over its block."""
    spread: bool
    """Whether the layer is no module of its own, as in OPT and BERT: its parts lie in the block."""
    dim: int
    hidden: int
    """Neurons."""
    activation: str
    """A name in `peerlm.ops.functions.ACTIVATIONS`, or the class of an activation that is none of these."""
    gated: bool
    activation_path: str | None
    """Of the module that applies the activation; None where a function does."""
    down: LinearMap
    """W, what neurons read with."""
    up: LinearMap
    """V, what neurons write."""
    gate: LinearMap | None
    """G."""
    sample_input: Tensor
    """(tokens, dim): what the layer read in the pass that found it."""
    sample_output: Tensor
    """(tokens, dim): what it made of that."""

    def neurons(self) -> Neurons:
        """The layer, neuron by neuron: views of the model's weights.

        Raises:
            ValueError: the activation is none of `ACTIVATIONS`.
        """
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"the activation of {self.path} is {self.activation}; neurons can be taken from layers with one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        return Neurons(
            activation=self.activation,
            down=self.down.weight,
            up=self.up.weight.T,
            gate=None if self.gate is None else self.gate.weight,
            down_bias=self.down.bias,
            gate_bias=None if self.gate is None else self.gate.bias,
            output_bias=self.up.bias,
        )


def find_ffws(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> list[FFW]:
    """Find the dense feed-forward layers in a transformer's blocks, in the model's order.

    Names do not matter. The model reads `inputs` once, in evaluation mode; the last map of a feed-forward layer is one
    that reads an activation of what an earlier map of the same block wrote. In a gated layer that is multiplied by what
    another map wrote.

    Args:
        model: any transformers model whose blocks lie in a `ModuleList`. It is left as it was.
        inputs: keyword arguments of its forward pass; by default random tokens, or a random image.

    Raises:
        ValueError: there is none (a mixture of experts, for one, is not dense), or inputs must be given.
    """
    return survey(model, inputs)[0]


def survey(model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> tuple[list[FFW], list[str]]:
    """What `find_ffws` returns, and the paths of mixtures of experts: stacked matrices, or lists of layers."""
    calls = _record_example(model) if inputs is None else _record(model, inputs)
    for call in calls:
        if call.y.isnan().any():
            raise ValueError(f"{call.path} of this {type(model).__name__} writes NaN; restore the model's weights")
    found = list(_search(calls, model))
    lists = [_list_of(model, ffw.path) for ffw in found]
    ffws = [ffw for ffw, experts in zip(found, lists, strict=True) if experts is None]
    mixtures = list(dict.fromkeys([*filter(None, lists), *_stacks(model)]))
    if not ffws and mixtures:
        raise ValueError(mixture_sentence(model, mixtures))
    if not ffws:
        raise ValueError(
            f"{type(model).__name__} has no dense feed-forward layer in its blocks; name a model with some"
        )
    return ffws, mixtures


def mixture_sentence(model: nn.Module, mixtures: list[str]) -> str:
    """What is said of a model with mixtures of experts."""
    return (
        f"{type(model).__name__} has mixtures of experts in its blocks, such as {mixtures[0]}; only dense feed-forward "
        "layers can be converted: name a dense model, or the numbers of its dense layers"
    )


def _stacks(model: nn.Module) -> Iterator[str]:
    """Paths of modules in blocks whose matrices are stacked: a parameter of three dimensions."""
    for path, module in model.named_modules():
        own = module.parameters(recurse=False)
        stacked = any(parameter.ndim == 3 and min(parameter.shape) > 1 for parameter in own)
        ours_or_convolution = hasattr(module, "parameter_roles") or isinstance(module, nn.modules.conv._ConvNd)
        if stacked and not ours_or_convolution and _block_of(model, path) is not None:
            yield path


def _list_of(model: nn.Module, path: str) -> str | None:
    """The path of the list inside a block that a layer is an item of."""
    parent = path.rpartition(".")[0]
    inside = _block_of(model, parent) is not None and isinstance(model.get_submodule(parent), nn.ModuleList)
    return parent if inside else None


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two random sequences of up to 8 tokens, or two random images, always the same ones.

    Raises:
        ValueError: the model reads something else.
    """
    config: Any = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        image = torch.rand(2, config.num_channels, height, width, generator=generator)
        return {"pixel_values": image.to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name}; pass inputs=, the arguments of its forward pass"
        )
    length = min(8, getattr(config, "max_position_embeddings", None) or 8)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator).to(model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


@dataclass(frozen=True, eq=False)
class _Call:
    """What a module read and wrote, as tokens: (T, features)."""

    path: str
    module: nn.Module
    x: Tensor
    y: Tensor


def _record(model: nn.Module, inputs: Mapping[str, Any]) -> list[_Call]:
    """Every call of a module inside a block that maps a tensor to a tensor, in the order of their ends."""
    calls: list[_Call] = []
    handles = []

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim > 0 and output.ndim > 0:
                calls.append(_Call(path, module, x.flatten(0, -2), output.flatten(0, -2)))

        return record

    for path, module in model.named_modules():
        if _block_of(model, path) is not None:
            handles.append(module.register_forward_hook(hook(path), with_kwargs=True))
    try:
        with evaluating(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _record_example(model: PreTrainedModel) -> list[_Call]:
    inputs = example_inputs(model)
    try:
        return _record(model, inputs)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot read random {' and '.join(inputs)} ({error}); pass inputs=, the "
            "arguments of its forward pass"
        ) from error


def _block_of(model: nn.Module, path: str) -> str | None:
    """The path of the block that a module lies in: the item of the outermost `ModuleList`."""
    names = path.split(".")
    module = model
    for depth, name in enumerate(names[:-1]):
        module = getattr(module, name)
        if isinstance(module, nn.ModuleList):
            return ".".join(names[: depth + 2])
    return None


def _search(calls: list[_Call], model: nn.Module) -> Iterator[FFW]:
    blocks: dict[str, list[_Call]] = {}
    for call in calls:
        blocks.setdefault(_block_of(model, call.path) or "", []).append(call)
    seen = set()
    for block in blocks.values():
        activations = _activations(block)
        linear = [call for call in block if isinstance(call.module, nn.Linear | Conv1D)]
        for index, last in enumerate(linear):
            readers = [call for call in reversed(linear[:index]) if call.x.shape == last.y.shape]
            ffw = _match(last, readers, activations, block) if last.path not in seen else None
            if ffw is not None:
                seen.add(last.path)
                yield ffw


def _activations(block: list[_Call]) -> dict[str | None, Callable[[Tensor], Tensor]]:
    """Functions of one number that this block may apply: its modules by their paths, then the usual ones."""
    found: dict[str | None, Callable[[Tensor], Tensor]] = {}
    for call in block:
        leaf = not any(True for _ in call.module.children())
        bare = not any(True for _ in (*call.module.parameters(), *call.module.buffers()))
        acts = call.x.shape == call.y.shape and not torch.equal(call.x, call.y)
        if leaf and bare and acts and _is_elementwise(call.module, call.x):
            found[call.path] = call.module
    return found


def _is_elementwise(function: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    grid = _grid(like.device)
    try:
        return torch.allclose(function(grid)[:9], function(grid[:9].clone()))
    except (RuntimeError, TypeError, IndexError):
        return False  # a norm over features of another number, or no function of one tensor


def _grid(device: torch.device) -> Tensor:
    return torch.linspace(-8, 8, 1001, device=device, dtype=torch.float32)


def _match(
    last: _Call, readers: list[_Call], activations: dict[str | None, Callable[[Tensor], Tensor]], block: list[_Call]
) -> FFW | None:
    candidates: list[tuple[str | None, str | None, Callable[[Tensor], Tensor]]] = [
        (path, None, act) for path, act in activations.items()
    ]
    candidates += [(None, name, act) for name, act in ACTIVATIONS.items()]
    matches = []
    for path, name, act in candidates:
        for down, gate, hidden in _combinations(readers, act, gated_only=name == "identity"):
            error = _relative_error(hidden, last.x)
            if error < (1e-4 if last.x.dtype in (torch.float32, torch.float64) else 1e-2):
                matches.append((error, path, name or _name_of(act, last.x), down, gate))
    if not matches:
        return None
    # The block's own module is exact, and comes first; of functions that fit, the nearest is what was applied.
    _, path, activation, (reader, half), gate = min(matches, key=lambda match: match[0])
    paths = [last.path, reader.path] + ([gate[0].path] if gate else [])
    container = _container(paths, reader, last, block)
    return FFW(
        path=last.path if container is None else container,
        spread=container is None,
        dim=last.y.shape[-1],
        hidden=last.x.shape[-1],
        activation=activation,
        gated=gate is not None,
        activation_path=path,
        down=LinearMap(path=reader.path, module=reader.module, half=half),
        up=LinearMap(path=last.path, module=last.module),
        gate=None if gate is None else LinearMap(path=gate[0].path, module=gate[0].module, half=gate[1]),
        sample_input=reader.x,
        sample_output=last.y,
    )


_Reader = tuple[_Call, int | None]


def _combinations(
    readers: list[_Call], act: Callable[[Tensor], Tensor], *, gated_only: bool
) -> Iterator[tuple[_Reader, _Reader | None, Tensor]]:
    """The reading map, the gate if there is one, and what hidden neurons then are, (T, F)."""
    for reader in readers:
        if not gated_only:
            yield (reader, None), None, act(reader.y.clone())
        if reader.y.shape[-1] % 2 == 0:
            halves = reader.y.chunk(2, dim=-1)
            for half in (0, 1):
                yield (reader, 1 - half), (reader, half), act(halves[half].clone()) * halves[1 - half]
        for gate in readers:
            if gate is not reader and gate.y.shape == reader.y.shape:
                yield (reader, None), (gate, None), act(gate.y.clone()) * reader.y


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    size = wanted.float().norm().item()
    return (found.float() - wanted.float()).norm().item() / size if size > 0 else float("inf")


def _name_of(act: Callable[[Tensor], Tensor], like: Tensor) -> str:
    grid = _grid(like.device)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(act(grid.clone()), known(grid), rtol=1e-5, atol=1e-5):
            return name
    return type(act).__name__


def _container(paths: list[str], reader: _Call, last: _Call, block: list[_Call]) -> str | None:
    """The module that reads what the layer reads, and writes what it writes."""
    levels = [set(names) for names in zip(*(path.split(".") for path in paths), strict=False)]
    common = ".".join(names.pop() for names in takewhile(lambda names: len(names) == 1, levels))
    whole = (
        call for call in block if call.path == common and torch.equal(call.x, reader.x) and torch.equal(call.y, last.y)
    )
    return common if any(True for _ in whole) else None
