"""Edits by hooks, against models whose tables were changed."""

import copy

import pytest
import torch
import torch.nn.functional as F

from peerlm import UserError
from peerlm.interpret import Edit, edit, edit_effects, find_inspected_layers

TOKENS = torch.randint(320, (40,), generator=torch.Generator().manual_seed(4))


def with_table(model, layer, expert, factor):
    """A copy whose table has v of one expert multiplied."""
    changed = copy.deepcopy(model)
    target = {each.number: each for each in find_inspected_layers(changed)}[layer].module
    with torch.no_grad():
        if hasattr(target, "values"):
            target.values.write(target.values.rows[expert : expert + 1] * factor, expert)
        elif target.experts.scales is not None:
            target.experts.scales[expert, 1] *= factor
        else:
            target.experts.write(target.experts.up[expert : expert + 1] * factor, expert, vector=1)
    return changed


def logits_of(model, tokens=TOKENS[None]):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def busiest(model, layer):
    inspected = {each.number: each for each in find_inspected_layers(model)}[layer]
    seen = []
    handle = inspected.index.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    logits_of(model)
    handle.remove()
    return int(seen[0].flatten().mode().values)


@pytest.mark.parametrize("kind", ["peer", "pkm", "int8"])
@pytest.mark.parametrize("factor", [0.0, 2.0, -1.5])
@pytest.mark.usefixtures("float64")
def test_an_edit_is_the_same_as_another_table(kind, factor, new_model):
    model = new_model("pkm" if kind == "pkm" else "peer")
    if kind == "int8":
        for layer in find_inspected_layers(model):
            layer.module.experts.convert_rows("int8")
    expert, before = busiest(model, 2), logits_of(model)
    with edit(model, 2, expert, factor):
        edited = logits_of(model, TOKENS.view(2, 20))
    expected = logits_of(with_table(model, 2, expert, factor), TOKENS.view(2, 20))
    torch.testing.assert_close(edited, expected)
    assert (edited.flatten(0, 1) - before[0]).abs().max() > 1e-2
    assert logits_of(model).equal(before)


@pytest.mark.usefixtures("float64")
def test_edits_nest_and_end_with_an_exception(new_model):
    model = new_model()
    first, second, before = busiest(model, 1), busiest(model, 2), logits_of(model)
    expected = logits_of(with_table(with_table(model, 1, first, 0.0), 2, second, 3.0))
    with edit(model, 1, first, 0.0), edit(model, "model.layers.2.ffw", second, 3.0):
        torch.testing.assert_close(logits_of(model), expected)
    with pytest.raises(RuntimeError, match="stop"), edit(model, 1, first, 0.0):
        raise RuntimeError("stop")
    assert logits_of(model).equal(before)


@pytest.mark.usefixtures("float64")
def test_effects_are_those_of_each_edit_alone(new_model):
    model = new_model()
    edits = [Edit(layer, busiest(model, layer), factor) for layer in (1, 2) for factor in (0.0, 2.0)]
    unused = next(e for e in range(64) if e not in _fired(model))
    effects = edit_effects(model, TOKENS, [*edits, Edit(1, unused, 5.0)], context=16)
    assert effects[-1].change.abs().max() == 0
    assert effects[-1].positions == []
    for effect in effects[:-1]:
        changed = with_table(model, effect.edit.layer, effect.edit.expert, effect.edit.factor)
        divergence = torch.zeros(40)
        for start in range(0, 40, 16):
            window = TOKENS[start : start + 16]
            old, new = (logits_of(m, window[None])[0].log_softmax(dim=-1) for m in (model, changed))
            divergence[start : start + 16] = F.kl_div(new, old, log_target=True, reduction="none").sum(dim=-1)
            change = F.nll_loss(new[:-1], window[1:], reduction="none") - F.nll_loss(
                old[:-1], window[1:], reduction="none"
            )
            torch.testing.assert_close(effect.change[start + 1 : start + len(window)], change)
            assert effect.change[start] == 0
            for place, tokens in zip(effect.positions, effect.tokens, strict=True):
                if start <= place < start + 16:
                    best = new[place - start].exp().sort(descending=True)
                    assert [token for token, _ in tokens] == best.indices[:5].tolist()
                    assert [p for _, p in tokens] == pytest.approx(best.values[:5].tolist())
        assert effect.positions == divergence.sort(descending=True).indices[:4].tolist()
        assert effect.divergence == pytest.approx(divergence.sort(descending=True).values[:4].tolist())


def _fired(model):
    layer = find_inspected_layers(model)[0]
    seen = set()
    handle = layer.index.register_forward_hook(lambda module, args, output: seen.update(output[1].flatten().tolist()))
    for window in TOKENS.split(16):
        logits_of(model, window[None])
    handle.remove()
    return seen


def test_edits_are_read_from_the_command_line():
    assert Edit.read("1:23", 0.0) == Edit(1, 23, 0.0)
    assert Edit.read("model.layers.2.ffw:5=-1.5") == Edit("model.layers.2.ffw", 5, -1.5)
    for text, factor in (("1", 0.0), ("1:2=3", 0.0), ("a:b", 0.0)):
        with pytest.raises(UserError, match="names no expert; write LAYER:EXPERT, as in 1:123"):
            Edit.read(text, factor)
    with pytest.raises(UserError, match="'1:2' names no expert; write LAYER:EXPERT=FACTOR"):
        Edit.read("1:2")


def test_what_is_not_there_cannot_be_edited(new_model):
    model = new_model()
    with pytest.raises(UserError, match="layer is 7"), edit(model, 7, 0, 0.0):
        pass
    with pytest.raises(UserError, match="expert is 64"):
        edit_effects(model, TOKENS, [Edit(1, 64, 0.0)], context=16)
