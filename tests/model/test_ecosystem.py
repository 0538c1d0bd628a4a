"""The language model among the tools of others: peft, pipelines, hubs, shards, torch.compile."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, pipeline

from peerlm.data.tokenizer import train_tokenizer
from peerlm.model import PeerForCausalLM
from peerlm.testing import assert_within_budget, definition, float64

Build = Callable[..., PeerForCausalLM]
PEER_SETTINGS = {"num_experts": 64**2, "heads": 2, "experts_per_head": 3, "key_dim": 8}


def draw_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 64, shape)


def test_pipeline_writes_what_generate_does(tiny_model: Build) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat and saw a bird"] * 4, vocab_size=280)
    model = tiny_model(vocab_size=280).eval()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (result,) = write("the cat", max_new_tokens=6, do_sample=False)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert result["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_push_to_hub_uploads_what_save_pretrained_writes(tiny_model: Build, tmp_path: Path, monkeypatch) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))

    def upload(self: HfApi, *, repo_id: str, operations: list[Any], **_: Any) -> None:
        for operation in operations:
            target = hub / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)

    monkeypatch.setattr(HfApi, "create_commit", upload)
    model = tiny_model().eval()
    model.push_to_hub("someone/tiny")
    loaded = AutoModelForCausalLM.from_pretrained(hub / "someone/tiny")
    ids = draw_tokens(1, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_shards_and_device_map(tiny_model: Build, tmp_path: Path, kind: str) -> None:
    model = tiny_model(ffw_layers=kind, peer=PEER_SETTINGS).eval()
    model.save_pretrained(tmp_path, max_shard_size="1MB" if kind == "peer" else "20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3
    ids = draw_tokens(2, 9)
    for options in ({}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("query_norm", ["layer", "batch"])
def test_rows_of_a_batch_have_their_own_lora_of_the_query(tiny_model: Build, query_norm: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(peer=PEER_SETTINGS | {"query_norm": query_norm})
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "query_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    adapted.eval()
    ids, expected = draw_tokens(3, 9), []
    for row, name in enumerate(["first", "second"]):
        adapted.set_adapter(name)
        expected.append(adapted(input_ids=ids[row : row + 1]).logits)
    with adapted.disable_adapter():
        expected.append(adapted(input_ids=ids[2:]).logits)
    found = adapted(input_ids=ids, adapter_names=["first", "second", "__base__"]).logits
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # which peft reads
@pytest.mark.usefixtures("float64")
def test_lora_of_peft_on_our_model(tiny_model: Build, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(peer=PEER_SETTINGS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = draw_tokens(2, 9)
    plain = model.eval()(ids).logits
    targets = ["q_proj", "v_proj", "query_proj", "up_proj"]  # attention, PEER's query, dense layers
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path)
    trained = adapted(input_ids=ids).logits
    assert not torch.allclose(trained, plain)
    base = tiny_model(peer=PEER_SETTINGS)
    base.load_state_dict(before)
    # batch statistics of the query are buffers, which no adapter saves
    for ours, theirs in zip(base.buffers(), adapted.get_base_model().buffers(), strict=True):
        ours.copy_(theirs)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile warns of what it does
def test_torch_compile_of_the_whole_model(tiny_model: Build) -> None:
    model = tiny_model(peer=PEER_SETTINGS, ffw_layers="peer")
    ids = draw_tokens(2, 9)
    compiled = torch.compile(model)
    judge = definition(model)

    def gradients(call: Callable[..., Any], of: torch.nn.Module) -> dict[str, torch.Tensor]:
        of.zero_grad()
        call(ids, labels=ids).loss.backward()
        return {name: parameter.grad.to_dense() for name, parameter in of.named_parameters()}

    with float64():
        exact = gradients(judge, judge)
    assert_within_budget(gradients(compiled, model), gradients(model, model), exact)
    torch._dynamo.reset()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_saved_table_takes_no_memory_until_its_rows_are_read(tiny_model: Build, tmp_path: Path) -> None:
    tiny_model(ffw_layers="peer", num_hidden_layers=1, peer=PEER_SETTINGS | {"num_experts": 512**2}).save_pretrained(
        tmp_path
    )
    megabytes = (tmp_path / "model.safetensors").stat().st_size // 2**20
    assert megabytes >= 64
    before = _resident()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert _resident() - before < 16 * 2**20
    anonymous = _resident("RssAnon")
    model(draw_tokens(1, 4))
    assert _resident("RssAnon") - anonymous < 16 * 2**20  # pages of the file, which the system may take back


def _resident(which: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(which))
