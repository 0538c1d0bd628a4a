"""The language model: loss, masks, causality, cache, saving, and what transformers expects of it."""

import copy
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from peerlm.layers import (
    PEER,
    DenseFFW,
    ExpertChoiceMoE,
    FineGrainedMoE,
    HashedNgrams,
    ProductKeyMemory,
    TokenChoiceMoE,
)
from peerlm.model import FFW_KINDS, PeerForCausalLM, PeerModel

from ..host_reads import NoHostReads

pytestmark = pytest.mark.usefixtures("float64")

CAUSAL_KINDS = [kind for kind in FFW_KINDS if kind != "expert_choice"]
OUTPUTS = {  # the matrix of each kind that writes to the residual stream
    "dense": "ffw.up_proj.weight",
    "swiglu": "ffw.up_proj.weight",
    "peer": "ffw.experts.up",
    "pkm": "ffw.values.rows",
    "expert_choice": "ffw.up",
    "token_choice": "ffw.up",
    "fine_grained_moe": "ffw.up",
    "hashed_ngrams": "ffw.value_proj.weight",
}
Build = Callable[..., PeerForCausalLM]


def draw_tokens(*shape: int) -> Tensor:
    return torch.randint(1, 64, shape)


def warmed_up(model: PeerForCausalLM) -> PeerForCausalLM:
    """In evaluation, with running statistics that are not the initial ones."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(draw_tokens(4, 16))
    return model.eval()


def query_statistics(model: PeerForCausalLM) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if ".running_" in name}


def test_kinds_of_layers(tiny_model: Build) -> None:
    kinds = ["dense", "swiglu", "peer", "pkm", "expert_choice", "token_choice", "fine_grained_moe", "hashed_ngrams"]
    model = tiny_model(num_hidden_layers=len(kinds), ffw_layers=kinds)
    classes = [
        DenseFFW,
        DenseFFW,
        PEER,
        ProductKeyMemory,
        ExpertChoiceMoE,
        TokenChoiceMoE,
        FineGrainedMoE,
        HashedNgrams,
    ]
    assert [type(block.ffw) for block in model.model.layers] == classes
    assert model.model.layers[0].ffw.up_proj.in_features == 4 * 32
    assert model.model.layers[1].ffw.up_proj.in_features == round(8 / 3 * 32)
    assert model.model.layers[2].ffw.experts.num_experts == 16


@pytest.mark.parametrize("kind", ["dense", "swiglu"])
def test_a_training_step_learns_nothing_from_the_device(tiny_model: Build, kind: str) -> None:
    model, ids = tiny_model(ffw_layers=kind).train(), draw_tokens(2, 8)
    with NoHostReads():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_intermediate_size_sets_dense_layers(tiny_model: Build) -> None:
    model = tiny_model(intermediate_size=60, ffw_layers=["dense", "swiglu", "peer"])
    assert [model.model.layers[i].ffw.up_proj.in_features for i in (0, 1)] == [60, 40]


@pytest.mark.parametrize("kind", FFW_KINDS)
def test_loss_is_the_shifted_cross_entropy(tiny_model: Build, kind: str) -> None:
    model, ids = tiny_model(ffw_layers=kind).eval(), draw_tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) > 6, -100)
    out = model(ids, labels=labels)
    assert out.logits.shape == (2, 9, 64)
    expected = F.cross_entropy(out.logits[:, :6].reshape(-1, 64), ids[:, 1:7].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    assert model(ids).loss is None


def test_balance_loss_is_added_in_training_only(tiny_model: Build) -> None:
    model, ids = tiny_model(ffw_layers=["token_choice", "dense", "token_choice"]), draw_tokens(2, 9)
    plain = copy.deepcopy(model)
    plain.config.balance_loss_coefficient = 0.0
    losses = [model.model.layers[i].ffw for i in (0, 2)]
    difference = model(ids, labels=ids).loss - plain(ids, labels=ids).loss
    expected = 0.01 * (losses[0].balance_loss + losses[1].balance_loss) / 2
    torch.testing.assert_close(difference, expected)
    model.eval()
    plain.eval()
    assert torch.equal(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)


@pytest.mark.parametrize("kind", FFW_KINDS)
def test_every_parameter_is_trained(tiny_model: Build, kind: str) -> None:
    model, ids = tiny_model(ffw_layers=kind), draw_tokens(4, 16)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or "query_norm.bias" in name, name


@torch.no_grad()
def test_starts_with_logits_of_unit_variance_but_for_the_token_itself(tiny_model: Build) -> None:
    for kind in FFW_KINDS:
        ids = draw_tokens(8, 32)
        logits = tiny_model(ffw_layers=kind)(ids).logits
        others = logits[torch.arange(64) != ids[..., None]]
        assert others.std().item() == pytest.approx(1, abs=0.15), kind


@torch.no_grad()
def test_the_residual_stream_starts_with_unit_mean_square(tiny_model: Build) -> None:
    embedded = tiny_model().model.embed_tokens(torch.arange(64))
    assert embedded.square().mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_later_tokens_never_change_earlier_logits(tiny_model: Build, kind: str) -> None:
    model, ids = warmed_up(tiny_model(ffw_layers=kind)), draw_tokens(2, 12)
    changed = ids.clone()
    changed[:, 7:] = draw_tokens(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(changed).logits[:, :7], model(ids).logits[:, :7])


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_a_sequence_does_not_see_the_rest_of_the_batch(tiny_model: Build, kind: str) -> None:
    model, ids = warmed_up(tiny_model(ffw_layers=kind)), draw_tokens(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(row[None]).logits for row in ids]), model(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_padding_changes_nothing(tiny_model: Build, kind: str, side: str) -> None:
    model, ids = warmed_up(tiny_model(ffw_layers=kind)), draw_tokens(2, 7)
    padding, ones = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    parts = [padding, ids] if side == "left" else [ids, padding]
    mask = torch.cat([padding, ones] if side == "left" else [ones, padding], dim=1)
    with torch.no_grad():
        logits = model(torch.cat(parts, dim=1), attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()].view(2, 7, -1), model(ids).logits)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_padding_stays_out_of_the_query_statistics(tiny_model: Build, kind: str) -> None:
    """In training too: what stands at padding changes neither statistics nor the logits of real tokens."""
    model, ids = tiny_model(ffw_layers=kind), draw_tokens(2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    twin, other = copy.deepcopy(model), torch.where(mask.bool(), ids, draw_tokens(2, 8))
    logits, logits_of_other = model(ids, attention_mask=mask).logits, twin(other, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], logits_of_other[mask.bool()])
    initial = query_statistics(tiny_model(ffw_layers=kind))
    for (name, statistic), same in zip(query_statistics(model).items(), query_statistics(twin).values(), strict=True):
        torch.testing.assert_close(statistic, same)
        assert not torch.equal(statistic, initial[name]), name


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_generation_with_cache_equals_generation_without(tiny_model: Build, kind: str) -> None:
    model, ids = warmed_up(tiny_model(ffw_layers=kind, num_key_value_heads=2)), draw_tokens(2, 5)
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
    }
    cached = model.generate(ids, use_cache=True, **settings)
    plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits))


def test_cached_steps_equal_one_pass(tiny_model: Build) -> None:
    model, ids = warmed_up(tiny_model()), draw_tokens(2, 9)
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), model(ids).logits)


def test_generation_of_left_padded_prompts_equals_each_alone(tiny_model: Build) -> None:
    model = warmed_up(tiny_model())
    prompts = [draw_tokens(1, 3), draw_tokens(1, 6)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 6 - prompt.shape[1] :], mask[row, 6 - prompt.shape[1] :] = prompt[0], 1
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 6:], model.generate(prompt, **settings)[0, prompt.shape[1] :])


def test_reentrant_checkpointing_would_hide_the_balance_loss_and_is_refused(tiny_model: Build) -> None:
    model, ids = tiny_model(ffw_layers="token_choice"), draw_tokens(2, 9)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"keeps gradients from the balance loss.*'use_reentrant': False"):
        model(ids, labels=ids, use_cache=False)
    model.config.balance_loss_coefficient = 0.0
    model(ids, labels=ids, use_cache=False).loss.backward()


def test_the_balance_loss_stands_apart_for_losses_of_others(
    tiny_model: Build, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(ffw_layers="token_choice", balance_loss_coefficient=0.5), draw_tokens(2, 9)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.get_logger("transformers").warning_once.cache_clear()  # type: ignore[attr-defined]
    out = model(ids, labels=ids)
    assert not caplog.records
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, plain + out.aux_loss)
    losses = [block.ffw.balance_loss for block in model.model.layers]
    torch.testing.assert_close(out.aux_loss, 0.5 * torch.stack(losses).mean())
    torch.testing.assert_close(model(ids).aux_loss, out.aux_loss)
    assert "lacks the balance loss of token-choice layers. Add `outputs.aux_loss`" in caplog.text
    assert model.eval()(ids, labels=ids).aux_loss is None


def test_losses_of_micro_batches_add_up_to_that_of_the_step(tiny_model: Build) -> None:
    model, ids = tiny_model(ffw_layers="token_choice", balance_loss_coefficient=0.5), draw_tokens(3, 9)
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[0], [3], [6]]), -100)
    predicted = [8, 6, 3]  # the first label of a row predicts nothing
    outs = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=sum(predicted)) for i in range(3)]
    alone = [model(ids[i : i + 1], labels=labels[i : i + 1]) for i in range(3)]
    expected = sum(n * out.loss for n, out in zip(predicted, alone, strict=True)) / sum(predicted)
    torch.testing.assert_close(sum(out.loss for out in outs), expected)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    both = [
        model(ids, labels=labels, num_items_in_batch=torch.tensor(34), **more).loss
        for more in ({}, {"shift_labels": shifted})
    ]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(both[0], model(ids, labels=labels).loss / 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FFW_KINDS)
def test_saving_and_loading(tiny_model: Build, tmp_path: Path, kind: str, tied: bool) -> None:
    model, ids = warmed_up(tiny_model(ffw_layers=kind, tie_word_embeddings=tied)), draw_tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, PeerForCausalLM)
    assert not loaded.training
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, found[name]), name
    with torch.no_grad():
        # Not bit for bit: the loaded tensors may lie at other alignments.
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, PeerModel)
    assert torch.equal(
        base.layers[0].ffw.state_dict().popitem()[1], model.model.layers[0].ffw.state_dict().popitem()[1]
    )


def test_tied_matrices_stay_tied(tiny_model: Build) -> None:
    model, ids = tiny_model(), draw_tokens(2, 5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(ids).logits.shape == (2, 5, 70)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_eager_attention_equals_sdpa(tiny_model: Build, key_value_heads: int) -> None:
    model, ids = warmed_up(tiny_model(num_key_value_heads=key_value_heads)), draw_tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        fused = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        eager = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(fused[mask.bool()], eager[mask.bool()])


def test_hidden_states_and_attentions(tiny_model: Build) -> None:
    model, ids = tiny_model(attn_implementation="eager").eval(), draw_tokens(2, 5)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in out.hidden_states] == [(2, 5, 32)] * 4
    assert [attention.shape for attention in out.attentions] == [(2, 4, 5, 5)] * 3
    torch.testing.assert_close(out.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


def test_only_the_logits_that_are_kept(tiny_model: Build) -> None:
    model, ids = tiny_model().eval(), draw_tokens(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


def test_embeddings_instead_of_ids(tiny_model: Build) -> None:
    model, ids = tiny_model().eval(), draw_tokens(2, 5)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
        torch.testing.assert_close(embedded, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds, exactly one of them"):
            model(**arguments)


def test_what_blocks_add_to_the_residual_stream_is_scaled_down(tiny_model: Build) -> None:
    for kind, name in OUTPUTS.items():
        shallow, deep = (tiny_model(num_hidden_layers=n, ffw_layers=kind).model.layers[0] for n in (1, 16))
        for output in ("self_attn.o_proj.weight", name):
            ratio = (attrgetter(output)(shallow).std() / attrgetter(output)(deep).std()).item()
            assert ratio == pytest.approx(4.0, rel=0.3), (kind, output)


def test_feed_forward_layers_start_at_the_scale_that_is_set(tiny_model: Build) -> None:
    for kind, name in OUTPUTS.items():
        full, half = (tiny_model(ffw_layers=kind, ffw_init_scale=s).model.layers[0] for s in (1.0, 0.5))
        ratio = (attrgetter(name)(full).std() / attrgetter(name)(half).std()).item()
        assert ratio == pytest.approx(2.0, rel=0.3), kind


def test_new_models_differ_by_seed_alone(tiny_model: Build) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(tiny_model().state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not all(torch.equal(models[0][name], models[2][name]) for name in models[0])


@pytest.mark.parametrize("load", ["from_pretrained", "load_state_dict", "safetensors"])
def test_memories_saved_under_the_earlier_name_of_their_values_load(
    load: str, tiny_model: Callable[..., PeerForCausalLM], tmp_path: Path
) -> None:
    saved, other = tiny_model(ffw_layers="pkm"), tiny_model(ffw_layers="pkm")
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    earlier = {name.replace(".values.rows", ".values"): value for name, value in tensors.items()}
    assert len(earlier.keys() - tensors.keys()) == 3
    save_file(earlier, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if load == "from_pretrained":
        other, report = PeerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        other.save_pretrained(tmp_path / "again")
        assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
    elif load == "load_state_dict":
        other.load_state_dict(earlier | {"lm_head.weight": saved.lm_head.weight})
    else:
        load_model(other, tmp_path / "model.safetensors")
    assert not other.state_dict().keys() - saved.state_dict().keys()
    for name, value in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
