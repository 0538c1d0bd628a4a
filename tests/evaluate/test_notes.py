"""What stands beside figures that cannot be taken as they are."""

import torch

from peerlm.evaluate import evaluate, notes_on_generation
from peerlm.evaluate.notes import notes_on
from peerlm.model import PeerConfig, PeerForCausalLM


def test_figures_of_expert_choice_say_that_the_future_is_seen(tokenizer, model, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = PeerConfig(
        vocab_size=300, **sizes, ffw_layers=["dense", "expert_choice"], expert_choice={"num_experts": 4}
    )
    chooser = PeerForCausalLM(config).eval()
    chooser.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old keeper climbed the stairs and lit the lamp.")
    (row,) = evaluate(tmp_path / "model", [tmp_path / "text.txt"], context=16, progress=False).values()
    (note,) = row["notes"]
    assert "sees the future" in note
    assert "up to 128" in note  # 2,048 tokens in a pass
    assert "write token by token" in notes_on_generation(chooser, tokenizer)[0]
    # Which is so: what comes later changes what came before.
    ids = torch.arange(1, 17)[None]
    changed = ids.clone()
    changed[0, 8:] = torch.arange(40, 48)
    with torch.no_grad():
        before, after = (chooser(each).logits[0, :8] for each in (ids, changed))
    assert not torch.allclose(before, after)


def test_causal_models_need_no_note(model):
    assert notes_on(model, windows_per_pass=8) == []
