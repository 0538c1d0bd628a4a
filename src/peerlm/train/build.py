"""From a configuration to the things that train: text, model, optimizer, and all of them as a `Training`."""

import logging
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from peerlm.data import Manifest, TokenShards, TokenWindows, load_tokenizer, prepare
from peerlm.data.manifest import MANIFEST_FILE
from peerlm.data.output import say_old_split
from peerlm.data.request import difference, sources_said
from peerlm.data.sources import fingerprint, resolve
from peerlm.errors import UserError
from peerlm.layers import Table
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ops import api
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.catch_up import check_betas
from peerlm.optim.muon import GROUP
from peerlm.parallel import build_from, checkpoint_attention, mesh
from peerlm.ranks import Ranks
from peerlm.train.budget import Budget
from peerlm.train.checkpoint import list_checkpoints
from peerlm.train.config import DataConfig, TrainConfig
from peerlm.train.growth import Growing, check_growths, read_growths, training_flops, with_shells
from peerlm.train.recipe import unknown_key
from peerlm.train.tables import cache_on, tables_by
from peerlm.train.training import Hook, Training
from peerlm.train.watching import UpToDateRows, UsageSample

log = logging.getLogger(__name__)

_QUICKER_BY_ROWS = 4
"""Retrieved rows of a step over rows of the table, up to which a step by rows took no longer (docs/log.md)."""


def prepare_data(config: DataConfig, *, progress: bool) -> None:
    """Prepare the data's folder where the configuration names sources and it is not there yet.

    A folder that is prepared already is used as it is; where it was made otherwise than configured, that is said.
    """
    if (Path(config.folder) / MANIFEST_FILE).is_file():
        say_what_is_not_used(config)
    elif config.sources:
        prepare(
            config.sources,
            config.folder,
            vocab_size=config.vocab_size,
            holdout=config.holdout,
            workers=config.prepare_workers,
            progress=progress,
        )


def say_what_is_not_used(config: DataConfig) -> None:
    """Say which settings of [data] a folder that is prepared already leaves without effect."""
    manifest = Manifest.read(config.folder)
    say_old_split(config.folder, manifest)
    if not config.sources:
        return
    different = []
    try:
        now = [fingerprint(source) for source in resolve(config.sources)]
    except (UserError, OSError) as error:
        made_from = sources_said(manifest.request["sources"])
        different.append(f"sources = {made_from}, and those of the recipe cannot be read ({error})")
    else:
        if now != manifest.request["sources"]:
            different.append(difference("sources", manifest.request["sources"], now))
    for name in ("vocab_size", "holdout"):
        if getattr(config, name) != manifest.request[name]:
            different.append(difference(name, manifest.request[name], getattr(config, name)))
    if different:
        log.warning(
            "%s is prepared already and used as it is, so that some settings of the recipe have no effect: it was "
            "prepared with %s.",
            config.folder,
            "; ".join(different),
        )


def open_data(config: DataConfig, ranks: Ranks, *, progress: bool) -> tuple[TokenWindows, TokenWindows]:
    """Training and held-out windows; rank 0 prepares the data first where the configuration names sources.

    Raises:
        UserError: data that cannot be prepared or read, or a batch that cannot be shared out.
    """
    if config.batch_size % ranks.world_size:
        raise UserError(
            f"data.batch_size = {config.batch_size} is not divisible by the {ranks.world_size} processes that train: "
            "choose a multiple"
        )
    with ranks.together():
        if ranks.is_main:
            prepare_data(config, progress=progress)
    train, heldout = (TokenWindows(TokenShards(config.folder, split), config.context) for split in ("train", "heldout"))
    return train, heldout


def build_training(
    config: TrainConfig, ranks: Ranks, windows: TokenWindows, *hooks: Hook, progress: bool = False
) -> Training:
    """A new model and all that trains it by a recipe on these windows, growth included; `hooks` come last.

    With `progress` it shows on stderr how far large tables in files are drawn.

    Raises:
        UserError: a setting that cannot be used.
    """
    context = config.data.context
    model = build_model(config, windows.shards, ranks.device, progress=progress)
    growths = read_growths(config.grow)
    if growths:
        check_growths(model, growths)
    optimizer = build_optimizer(model, config, ranks)
    tokens_per_step = config.data.batch_size * context
    flops_per_token = training_flops(model, growths, context)
    return Training(
        config=config,
        ranks=ranks,
        windows=windows,
        model=model,
        weights=model,
        tokenizer=load_tokenizer(windows.shards.folder),
        optimizer=optimizer,
        flops_per_step=tokens_per_step * flops_per_token[0],
        budget=Budget.plan(
            config.budget,
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token,
            shares=[growth.share for growth in growths],
        ),
        hooks=[
            *([Growing(growths)] if growths else []),
            UsageSample(0 if config.compile else config.log.every),
            UpToDateRows(),
            *hooks,
        ],
    )


def new_model(
    config: TrainConfig, *, vocab_size: int, eos_token_id: int | None = None, bos_token_id: int | None = None
) -> PeerForCausalLM:
    """The model of a recipe's [model], for a vocabulary, with weights from torch's generator; on the default device.

    Raises UserError where [model] is none that can be built.
    """
    known = list(PeerConfig.__annotations__)
    for key in config.model:
        if key not in known:
            raise unknown_key(f"model.{key}", [f"model.{name}" for name in known])
    settings: dict[str, Any] = {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "vocab_size": vocab_size,
        **(with_shells(config.model) if config.grow.at else config.model),
    }
    settings.setdefault("max_position_embeddings", max(config.data.context, PeerConfig.max_position_embeddings))
    if settings["vocab_size"] < vocab_size:
        raise UserError(
            f"model.vocab_size = {settings['vocab_size']} is less than the data's {vocab_size}: leave it out"
        )
    try:
        return PeerForCausalLM(PeerConfig(**settings))
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"no model can be built from the recipe's [model]: {reason}") from error


def build_model(
    config: TrainConfig, shards: TokenShards, device: torch.device, *, progress: bool = False
) -> PreTrainedModel:
    """A new model with weights from `config.seed`, for the vocabulary of `shards`.

    Raises UserError where the recipe's [model] is none that can be built.
    """
    torch.manual_seed(config.seed)
    make = partial(
        new_model,
        config,
        vocab_size=shards.vocab_size,
        eos_token_id=shards.eos_token_id,
        bos_token_id=shards.window_start[-1] if shards.window_start else None,
    )
    with tables_by(
        config,
        device_type=device.type,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        resume=bool(list_checkpoints(Path(config.run))),
        progress=progress,
    ):
        model = _spread(make, config)
    if config.data.context > model.config.max_position_embeddings:
        raise UserError(
            f"data.context = {config.data.context} is more than model.max_position_embeddings = "
            f"{model.config.max_position_embeddings}: raise the latter or leave it out"
        )
    if config.gradient_checkpointing and config.parallel.sharded:
        checkpoint_attention(model)  # not the tables: ranks would exchange their tokens twice
    elif config.gradient_checkpointing:
        # transformers renamed it after 5.20, the last release for Python 3.10
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    train_scaled_rows(model)
    cache_on(model, config, device)
    nn.Module.to(model, device)
    return model


def _spread(make: Callable[[], PeerForCausalLM], config: TrainConfig) -> PeerForCausalLM:
    """A new model, whose tables are sharded where [parallel] says so.

    Raises UserError where they cannot be.
    """
    parallel = config.parallel
    if not parallel.sharded:
        return make()
    try:
        ranks = mesh(rows=parallel.rows, cols=parallel.cols, replica=parallel.replica)
        replica, cols, _ = ranks.shape
        config.check_cut(cols=cols, replica=replica)  # again: the recipe need not say what is left for columns
        return build_from(make, ranks, dense=parallel.dense)
    except ValueError as error:
        raise UserError(f"tables cannot be sharded as [parallel] says: {error}") from error


def train_scaled_rows(model: nn.Module) -> None:
    """Let a new model's rows of 8 bits be trained, which have no gradient that a parameter could ask for.

    Raises UserError where rows are of a format that is not trained at all.
    """
    for module in model.modules():
        if isinstance(module, Table) and not module.has_gradients:
            try:
                module.train_in_place()
            except ValueError as error:
                raise UserError(
                    f"row_format = {module.row_format!r} in [model]: {error}; train in float32, and convert the model "
                    "with `peerlm convert-rows`"
                ) from error


def build_optimizer(model: nn.Module, config: TrainConfig, ranks: Ranks) -> torch.optim.Optimizer:
    """AdamW over the groups of `parameter_groups`; set_learning_rates sets the rates before each step.

    Raises UserError where `optim.tables` asks for what this run cannot have.
    """
    optim = config.optim
    scaled = [module for module in model.modules() if isinstance(module, Table) and module.trained_in_place]
    groups = parameter_groups(
        model,
        weight_decay=optim.weight_decay,
        table_lr_multiplier=optim.table_lr_multiplier,
        keys_lr_multiplier=optim.keys_lr_multiplier,
        muon=optim.matrices == "muon",
    )
    if optim.matrices == "muon":
        _prepare_muon(groups, config)
    options: dict[str, Any] = {
        "lr": optim.learning_rate,
        "betas": (optim.beta1, optim.beta2),
        "eps": optim.eps,
    }
    tables: str = optim.tables
    obstacle = _obstacle_to_rows(config, ranks)
    needs_rows = _need_of_rows(model, config)
    if scaled:
        tables = _tables_in_place(tables, scaled[0].row_format)
    if tables == "fused" and config.grow.freeze:
        what = f"row_format = {scaled[0].row_format!r}" if scaled else "optim.tables = 'fused'"
        raise UserError(f"{what} cannot be combined with grow.freeze: the backward pass updates all rows")
    if tables == "auto" and config.parallel.sharded:
        tables = "exact"
    elif tables == "auto":
        tables = "exact" if needs_rows or (not obstacle and _rows_pay(model, config, ranks)) else "dense"
    if tables == "dense":
        if needs_rows:
            raise UserError(f"optim.tables = 'dense' cannot be combined with {needs_rows}: leave one of them out")
        if optim.matrices == "adamw":
            return torch.optim.AdamW(groups, **options, fused=True)
        return RowAdamW([{"rows": False, **group} for group in groups], **options)
    beta1 = optim.beta1 if optim.table_beta1 is None else optim.table_beta1
    for group in groups:
        if group["name"] == "table":
            row_wise = optim.table_moment_columns or optim.table_row_wise
            group.update(betas=(beta1, optim.beta2), row_wise=row_wise)
    if tables == "fused" and not obstacle:
        micro_batch_size = config.data.micro_batch_size or config.data.batch_size
        if math.isfinite(optim.table_clip):
            obstacle = f"optim.table_clip = {optim.table_clip}: set it to inf"
        elif micro_batch_size < config.data.batch_size:
            obstacle = f"data.micro_batch_size = {micro_batch_size}: leave it out"
    if not obstacle and beta1 and tables != "lazy" and (narrow := _narrow_rows(model)):
        other = ", or optim.tables = 'lazy'" if narrow == "bfloat16" else ""
        raise UserError(
            f"row_format = {narrow!r} cannot be combined with a first moment of tables, beta1 = {beta1}: set "
            f"optim.table_beta1 = 0.0{other}"
        )
    if obstacle:
        raise UserError(f"optim.tables = {tables!r} cannot be combined with {obstacle}, or choose another value")
    try:
        return RowAdamW(groups, **options, lazy=tables == "lazy", fused=tables == "fused")
    except ValueError as error:
        raise UserError(f"optim.tables = {tables!r}: {error}") from error


def _narrow_rows(model: nn.Module) -> str | None:
    """The format of rows with fewer than 32 bits that are trained."""
    formats = (module.row_format for module in model.modules() if isinstance(module, Table) and module.requires_grad)
    return next((each for each in formats if each not in ("float32", "float64")), None)


def _tables_in_place(tables: str, row_format: str) -> str:
    """How tables are updated whose rows have no gradient; raises UserError where that is not what is configured."""
    if tables not in ("auto", "fused"):
        raise UserError(
            f"optim.tables = {tables!r} cannot be combined with row_format = {row_format!r}, whose rows have no "
            "gradient: set it to 'fused'"
        )
    return "fused"


def _prepare_muon(groups: list[dict[str, Any]], config: TrainConfig) -> None:
    """Give Muon's group its momentum; say which matrices AdamW trains. Raises UserError where there can be no Muon."""
    named = {group["name"]: group for group in groups}
    if GROUP not in named:
        raise UserError("optim.matrices = 'muon': the model has no matrix that Muon takes; set it to 'adamw'")
    named[GROUP]["momentum"] = config.optim.momentum
    if left := named.get("matrix", {}).get("params", ()):
        shapes = ", ".join(sorted({"x".join(map(str, parameter.shape)) for parameter in left}))
        log.warning("optim.matrices = 'muon': AdamW trains the output head and matrices of one row: %s", shapes)


def _obstacle_to_rows(config: TrainConfig, ranks: Ranks) -> str:
    """What keeps gradients from being sparse, and its fix; empty where nothing does."""
    if config.parallel.sharded:
        return ""
    if ranks.world_size > 1:
        return f"{ranks.world_size} processes, which exchange dense gradients: train with one, or set [parallel]"
    if config.compile:
        return "compile = true: set it to false"
    return ""


def _need_of_rows(model: nn.Module, run: TrainConfig) -> str:
    """What only an optimizer by rows can do; empty where nothing is asked for."""
    config = run.optim
    if run.tables.folder:
        return f"tables.folder = {run.tables.folder!r}"
    if config.table_beta1 is not None:
        return f"optim.table_beta1 = {config.table_beta1}"
    if config.table_row_wise:
        return "optim.table_row_wise = true"
    if config.table_moment_columns:
        return f"optim.table_moment_columns = {config.table_moment_columns}"
    if any(isinstance(module, Table) and module.row_format == "bfloat16" for module in model.modules()):
        return "row_format = 'bfloat16', whose small steps would be lost by rounding"
    return ""


def _rows_pay(model: nn.Module, config: TrainConfig, ranks: Ranks) -> bool:
    """Whether there are kernels for rows, these can catch up exactly, and some table's step by rows is the quicker."""
    try:
        check_betas(config.optim.beta1, config.optim.beta2)
    except ValueError:
        return False
    tokens = config.data.batch_size * config.data.context
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "looked_up_rows")]
    looked_up: Counter[Table] = Counter()  # a table that several layers share by all of them
    for layer in layers:
        looked_up.update(dict(layer.looked_up_rows()))
    largest = max((growth.sub_keys**2 for growth in read_growths(config.grow)), default=0)
    return api.updates_rows_on(ranks.device) and any(
        tokens * rows <= _QUICKER_BY_ROWS * max(table.num_rows, largest) for table, rows in looked_up.items()
    )
