"""A model whose documents begin with a token of their own learns and is measured on windows that begin so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peerlm.continual import LearnConfig, learn, stream
from peerlm.evaluate import load_model
from peerlm.marks import marks_of
from peerlm.model import PeerConfig, PeerForCausalLM


@pytest.fixture
def base(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(template="<s> $A", bos="<s>")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PeerConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=32, ffw_layers="dense")
    PeerForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(("start", "token"), [("auto", 0), ("<pad>", 2)])
def test_windows_begin_as_documents_do(
    base: Path,
    configure: Callable[..., LearnConfig],
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    token: int,
) -> None:
    held_out = str(texts / "law.txt")
    config = configure(
        only=1,
        model=str(base),
        stages=[{"name": "code", "text": [str(texts / "code.txt")], "heldout": held_out}],
        document_start=start,
        memory={"kl": 0.0, "replay": 0.0, "background": []},
        budget={"steps": 2},
    )
    seen = []
    monkeypatch.setattr(stream, "held_out_loss", lambda model, windows, **_: float(seen.append(windows) or 1.0))
    learn(config, progress=False)
    windows = torch.stack([seen[0][index] for index in range(len(seen[0]))])
    assert (windows[:, 0] == token).all()
    model, tokenizer = load_model(Path(config.run) / "stages/1-code/model")
    assert marks_of(model, tokenizer).start == (token,)  # what was learned is what is read from now on
