"""Retrieved adapters through peft: made, trained, saved, loaded, switched and refused as users do it."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peerlm.accounting import model_cost
from peerlm.adapters.config import PeerAdapterConfig
from peerlm.adapters.layer import PeerAdapterLayer
from peerlm.adapters.pool import AdapterPool
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.optim import RowAdamW, parameter_groups
from peerlm.optim.catch_up import TOLERANCE
from peerlm.testing import relative_error

from ..fresh import python

# Names that transformers 5.23 has deprecated: peft 0.21 asks by the one, and the other's successor is not in 5.20.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

IDS = torch.arange(24).view(2, 12) % 32
SMALL: dict[str, Any] = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 4, "weight_scale": 2.0}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(base: PreTrainedModel | None = None, **settings: Any) -> Any:
    settings = SMALL | {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings
    return get_peft_model(llama() if base is None else base, PeerAdapterConfig(**settings))


def pools(model: nn.Module) -> list[AdapterPool]:
    return [module for module in model.modules() if isinstance(module, AdapterPool)]


def wake(model: nn.Module, seed: int = 1, name: str = "default") -> None:
    """Give the experts of one adapter something to write."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, PeerAdapterLayer) and name in layer.peer_adapter_pools:
            layer.peer_adapter_pools[name].up.fill(lambda rows: rows.normal_(generator=generator))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids).logits


def loop_pool(pool: AdapterPool, x_TD: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """A pool's output one neuron at a time, over ids and weights from an index of its own."""
    weights, ids = pool.product_keys(x_TD)
    y = torch.zeros(len(x_TD), pool.out_features, dtype=x_TD.dtype)
    for t, x in enumerate(x_TD):
        for weight, expert in zip(weights[t].flatten(), ids[t].flatten().tolist(), strict=True):
            for row in range(expert * pool.rank, (expert + 1) * pool.rank):
                y[t] += pool.weight_scale * weight * act(pool.down.rows[row] @ x) * pool.up.rows[row]
    return y


@pytest.mark.parametrize(("activation", "act"), [("identity", lambda x: x), ("relu", torch.relu)])
@pytest.mark.parametrize(("inside", "outside", "rank"), [(5, 5, 1), (3, 7, 1), (7, 3, 3)])
def test_pool_is_the_sum_of_retrieved_neurons(
    activation: str, act: Callable[[Tensor], Tensor], inside: int, outside: int, rank: int
) -> None:
    pool = AdapterPool(inside, outside, rank=rank, activation=activation, **SMALL).double()
    pool.up.fill(nn.init.normal_)
    x = torch.randn(2, 3, inside, dtype=torch.float64)
    expected = loop_pool(pool, x.flatten(0, 1), act).view(2, 3, outside)
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.usefixtures("float64")
def test_a_single_expert_that_is_always_retrieved_is_lora() -> None:
    pool = AdapterPool(6, 4, num_experts=1, heads=1, experts_per_head=1, key_dim=2, rank=3)
    pool.up.fill(nn.init.normal_)
    x = torch.randn(5, 6)
    torch.testing.assert_close(pool(x), x @ pool.down.rows.T @ pool.up.rows)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj", "down_proj"], ["mlp"], "all-linear"])
def test_new_adapter_leaves_logits_bit_identical_and_then_changes_them(targets: list[str] | str) -> None:
    expected = logits(llama())
    model = adapted(target_modules=targets, module_dim=16)
    assert torch.equal(logits(model), expected)
    wake(model)
    changed = logits(model)
    assert not torch.allclose(changed, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(model.unload()), expected)


def test_adapter_beside_conv1d_of_gpt2() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    expected = logits(base)
    model = adapted(base, target_modules=["c_attn"])
    assert (pools(model)[0].in_features, pools(model)[0].out_features) == (16, 48)
    assert torch.equal(logits(model), expected)
    wake(model)
    assert not torch.allclose(logits(model), expected)


@pytest.mark.usefixtures("float64")
def test_outputs_are_causal_and_do_not_depend_on_the_batch() -> None:
    model = adapted()
    wake(model)
    whole = logits(model)
    torch.testing.assert_close(logits(model, IDS[:1, :7]), whole[:1, :7])


def test_generate_with_cache_writes_the_tokens_of_whole_passes() -> None:
    model = adapted()
    wake(model)
    model.generation_config.eos_token_id = None
    ids = IDS[:1, 3:7]
    written = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(5):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(written, ids)


def test_saved_alone_and_loaded_three_ways(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, rank=2)
    wake(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    size = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert size < 1.2 * 4 * sum(p.numel() for pool in pools(model) for p in pool.parameters()) + 8192
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, PeerAdapterConfig)
    assert (config.rank, config.target_modules) == (2, {"q_proj", "up_proj"})
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    renamed = PeftModel.from_pretrained(llama(), tmp_path / "adapter", adapter_name="other", low_cpu_mem_usage=True)
    assert torch.equal(logits(renamed), expected)


def test_two_adapters_are_added_switched_saved_and_deleted(tmp_path: Path) -> None:
    model = adapted()
    wake(model)
    first = logits(model)
    model.add_adapter("second", PeerAdapterConfig(**SMALL | {"num_experts": 25}, target_modules=["q_proj", "v_proj"]))
    wake(model, seed=2, name="second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second." in name for name in trained)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)
    loaded.delete_adapter("default")
    assert not any("default" in name for name, _ in loaded.named_parameters())
    assert torch.equal(logits(loaded), second)


class Cycles(Dataset[dict[str, Tensor]]):
    """Counting modulo 16 from each start."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        input_ids = (torch.arange(12) + index) % 16
        return {"input_ids": input_ids, "labels": input_ids}


def stock_trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 40,
        "logging_steps": 5,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    optimizer = RowAdamW(parameter_groups(model), lr=5e-2)
    return Trainer(
        model=model,
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=Cycles(),
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_trainer_with_row_adamw_trains_the_adapter_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(llama(dtype), rank=2)
    assert all(p.dtype == torch.float32 for pool in pools(model) for p in pool.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = stock_trainer(model, tmp_path)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("peer_adapter_pools" in name for name in changed)
    assert any(name.endswith("up.rows") for name in changed)
    assert any(name.endswith("sub_keys") for name in changed)


@pytest.mark.usefixtures("float64")
def test_gradients_of_tables_are_sparse_under_row_adamw_and_equal_dense_ones() -> None:
    model = adapted(num_experts=64).train()
    wake(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    dense = [p.grad for pool in pools(model) for table in (pool.down, pool.up) for p in table.row_parameters()]
    model.zero_grad()
    groups = parameter_groups(model)
    assert {group["name"] for group in groups} == {"matrix", "vector", "table", "keys"}
    optimizer = RowAdamW(groups)
    model(input_ids=IDS, labels=IDS).loss.backward()
    sparse = [p.grad for pool in pools(model) for table in (pool.down, pool.up) for p in table.row_parameters()]
    assert optimizer.param_groups
    assert all(grad is not None and grad.is_sparse for grad in sparse)
    assert any(len(grad.coalesce().values()) < 64 for grad in sparse)
    for one, other in zip(sparse, dense, strict=True):
        torch.testing.assert_close(one.to_dense(), other)


@pytest.mark.usefixtures("float64")
def test_saving_during_training_holds_the_rows_of_dense_adamw(tmp_path: Path) -> None:
    states = []
    for kind in (RowAdamW, torch.optim.AdamW):
        model = adapted(num_experts=64).train()
        optimizer = kind(parameter_groups(model), lr=1e-2)
        for start in range(6):
            optimizer.zero_grad()
            model(input_ids=(IDS + 5 * start) % 32, labels=IDS).loss.backward()
            optimizer.step()
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / kind.__name__)
        states.append([p for pool in pools(loaded) for p in pool.parameters()])
    for row_wise, dense in zip(*states, strict=True):
        assert relative_error(row_wise, dense) < TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = llama()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = adapted(base).train().double()
        wake(model)
        RowAdamW(parameter_groups(model))
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad.to_dense() for pool in pools(model) for p in pool.parameters()])  # type: ignore[union-attr]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_adapter_stays_in_bfloat16_if_asked_and_mixes_with_autocast() -> None:
    base = llama(torch.bfloat16)
    config = PeerAdapterConfig(**SMALL, target_modules=["q_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert pools(model)[0].down.rows.dtype == torch.bfloat16
    wake(model)
    assert logits(model).dtype == torch.bfloat16
    wide = adapted()
    wake(wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert (logits(wide) - logits(llama())).abs().max() > 0.01


def test_modules_to_save_and_printed_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.print_trainable_parameters()
    pool_parameters = sum(p.numel() for pool in pools(model) for p in pool.parameters())
    assert f"trainable params: {pool_parameters + 32 * 16:,}" in capsys.readouterr().out
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(2)
    wake(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_cost_counts_retrieved_experts_alone() -> None:
    pool = AdapterPool(6, 10, rank=2, **SMALL)
    cost = model_cost(pool, 1)
    query, keys = 6 * 2 * 4 + 2 * 4, 2 * 2 * 4 * 2
    assert cost.active_parameters == query + keys + 4 * 2 * 16
    assert cost.forward_flops_per_token == 2 * 6 * 8 + 2 * 2 * 4 * 4 + 2 * 4 * 2 * 16


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be merged into weights.*unload\(\)"):
        getattr(adapted(), method)()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 15}, "num_experts is 15, which is not a square number"),
        ({"experts_per_head": 5}, "experts_per_head is 5, more than the 4 sub-keys"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"activation": "swish"}, "activation is 'swish'; choose one of"),
        ({"query_norm": "group"}, "query_norm is 'group'; choose one of"),
        ({"dropout": 1.0}, "dropout is 1.0; it is a share"),
        ({"weight_scale": 0.0}, "weight_scale is 0.0"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
        ({"target_modules": ["nothing"]}, "not found in the base model"),
        ({"target_modules": ["mlp"]}, "the width of a LlamaMLP is not known; set module_dim"),
        ({"target_modules": "q_proj", "layers_to_transform": 1}, "layers_to_transform is 1, but target_modules is a"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    base = llama()
    for layer in base.model.layers:
        layer.mlp.hidden_size = None  # type: ignore[union-attr, assignment]
    with pytest.raises(ValueError, match=message):
        adapted(base, **settings)


def test_modules_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(TypeError, match="a Embedding does not map hidden states"):
        adapted(target_modules=["embed_tokens"])
    layer = PeerAdapterLayer(nn.GRU(16, 16), 16, 16)
    layer.add_pool("default", inference_mode=False, **SMALL)
    with pytest.raises(TypeError, match="GRU gives a tuple, and an adapter can only be added to a tensor"):
        layer(torch.randn(2, 3, 16))


def test_a_wrong_module_dim_is_named_when_the_module_runs() -> None:
    model = adapted(target_modules=["mlp"], module_dim=8)
    with pytest.raises(ValueError, match=r"LlamaMLP maps \(2, 12, 16\) to \(2, 12, 16\).*set module_dim"):
        logits(model)


@pytest.mark.whole_tables("names its parameters")
def test_names_that_are_parts_of_adapters_are_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="an adapter cannot be named 'rows'"):
        model.add_adapter("rows", PeerAdapterConfig(**SMALL, target_modules=["q_proj"]))


def test_adapters_of_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted().add_adapter("other", LoraConfig(target_modules=["q_proj"]))


def test_without_peft_the_reason_is_one_sentence(tmp_path: Path) -> None:
    code = "import sys; sys.modules['peft'] = None\nimport peerlm.adapters.library\nimport peerlm.adapters.config"
    outcome = python(code, tmp_path)
    assert outcome.returncode == 1
    line = outcome.stderr.strip().rpartition("\n")[2]
    assert line == 'ImportError: retrieved adapters need peft: pip install "peerlm[peft]"'


def test_the_type_is_a_member_of_peft_s_enumeration_like_any_other() -> None:
    kind = PeerAdapterConfig().peft_type
    assert kind is PeftType("PEER_ADAPTER") is PeftType["PEER_ADAPTER"] is PeftType.PEER_ADAPTER  # type: ignore[attr-defined]
    assert kind in list(PeftType)
    assert kind == kind.value == "PEER_ADAPTER"
    assert copy.deepcopy(kind) is pickle.loads(pickle.dumps(kind)) is kind


def test_all_linear_means_the_same_for_a_second_adapter() -> None:
    model = adapted(target_modules="all-linear")
    model.add_adapter("other", PeerAdapterConfig(**SMALL, target_modules="all-linear"))
    first, second = (model.peft_config[name].target_modules for name in ("default", "other"))
    assert first == second
    assert len(first) == 14
    assert all(
        layer.peer_adapter_pools.keys() == {"default", "other"}
        for layer in model.modules()
        if isinstance(layer, PeerAdapterLayer)
    )


def two_adapters(**settings: Any) -> Any:
    model = adapted(**settings)
    model.add_adapter("other", PeerAdapterConfig(**SMALL | {"num_experts": 25}, target_modules=["q_proj", "v_proj"]))
    wake(model)
    wake(model, seed=2, name="other")
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, name: str, ids: Tensor) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=ids).logits
    model.set_adapter(name)
    return model(input_ids=ids).logits


def test_each_row_has_the_adapter_that_is_named_for_it() -> None:
    model, ids = two_adapters(), torch.arange(48).view(4, 12) % 32
    names = ["other", "__base__", "default", "other"]
    expected = torch.cat([logits_of(model, name, ids[row : row + 1]) for row, name in enumerate(names)])
    for active in ("default", "other"):
        model.set_adapter(active)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, expected)
    assert torch.equal(logits(model, ids[:1]), logits_of(model, "other", ids[:1]))  # no hook is left


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sequences"],
)
@pytest.mark.parametrize("config", [False, True])
def test_rows_are_generated_by_their_adapters(options: dict[str, Any], config: bool) -> None:
    model, ids = two_adapters(), torch.arange(12).view(3, 4)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    if config:
        options = {"generation_config": GenerationConfig(**options)}
    expected = []
    for row, name in enumerate(["other", "__base__", "default"]):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model.generate(input_ids=ids[row : row + 1], **options))
        else:
            model.set_adapter(name)
            expected.append(model.generate(input_ids=ids[row : row + 1], **options))
    found = model.generate(input_ids=ids, adapter_names=["other", "__base__", "default"], **options)
    assert torch.equal(found, torch.cat(expected))


def test_modules_to_save_follow_the_names_of_rows() -> None:
    model = adapted(modules_to_save=["lm_head"])
    config = PeerAdapterConfig(**SMALL, target_modules=["v_proj"], modules_to_save=["lm_head"])
    model.add_adapter("other", config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["other"].weight.mul_(3)
        rows = [logits_of(model, name, IDS[:1]) for name in ("other", "default")]
        model.eval()
        found = model(input_ids=IDS[[0, 0]], adapter_names=["other", "default"]).logits
    torch.testing.assert_close(found, torch.cat(rows))
    assert not torch.allclose(*rows)


def test_names_of_rows_that_cannot_be_are_refused() -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match="adapter_names has 'third'; choose from default, other and __base__"):
        model(input_ids=IDS, adapter_names=["third", "other"])
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be .* but got 1 and 2"):
        model(input_ids=IDS, adapter_names=["other"])
    with pytest.raises(ValueError, match="alora_offsets is for adapters of the type LORA"):
        model(input_ids=IDS, alora_offsets=[1, 1])
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(input_ids=IDS, adapter_names=["other", "other"])


def test_sums_of_adapters_and_swaps_of_weights_are_refused(tmp_path: Path) -> None:
    model = two_adapters()
    with pytest.raises(ValueError, match=r"cannot be summed up in one.*set_adapter"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, tmp_path, adapter_name="default")


def test_targets_are_lora_s_where_none_are_named() -> None:
    peer = {"num_experts": 16, "heads": 2, "experts_per_head": 2, "key_dim": 4}
    ours = PeerForCausalLM(PeerConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, peer=peer))
    for base in (llama(), ours):
        for config in (PeerAdapterConfig(**SMALL), LoraConfig()):
            model = get_peft_model(copy.deepcopy(base), config)
            assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), PeerAdapterConfig(**SMALL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("query_norm", ["batch", "layer"])
def test_adapters_of_half_precision_models(tmp_path: Path, dtype: torch.dtype, cast: bool, query_norm: str) -> None:
    config = PeerAdapterConfig(**SMALL, query_norm=query_norm, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(dtype), config, autocast_adapter_dtype=cast).train()
    wake(model)
    tensors = [*pools(model)[0].parameters(), *pools(model)[0].buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32 if cast else dtype}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    expected = logits(model)
    assert expected.dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, autocast_adapter_dtype=cast)
    assert torch.equal(logits(loaded), expected)
