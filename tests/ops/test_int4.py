"""Rows of int4, groups of 32 with a scale: what is stored, read, and computed with."""

from pathlib import Path

import pytest
import torch

from peerlm import PEER, PeerConfig, PeerForCausalLM
from peerlm.convert import convert
from peerlm.convert.rows import convert_rows_of_folder
from peerlm.convert.saved import load_saved
from peerlm.errors import UserError
from peerlm.layers import ExpertTable
from peerlm.ops import api
from peerlm.ops.cpu import native
from peerlm.ops.row_formats import INT4, quantise, widened
from peerlm.testing import assert_within_budget, relative_error

from ..models import run


def test_every_number_comes_back() -> None:
    rows = torch.arange(-8.0, 8.0).repeat(3, 2, 4) * torch.tensor([0.5, 3.0])[:, None]
    stored, scales = quantise(rows, INT4)
    assert stored.dtype == torch.uint8
    assert stored.shape == (3, 2, 32)
    assert scales.shape == (3, 2, 2)
    torch.testing.assert_close(widened(stored, scales), rows)


def test_normal_numbers_lose_a_tenth() -> None:
    rows = torch.randn(200, 2, 128, generator=torch.Generator().manual_seed(0))
    lost = relative_error(widened(*quantise(rows, INT4)), rows)
    assert 0.07 < lost < 0.1  # -8 .. 7 for the largest of 32 alone loses 0.093
    assert torch.equal(widened(*quantise(torch.zeros(1, 2, 32), INT4)), torch.zeros(1, 2, 32))
    assert widened(*quantise(torch.full((1, 1, 32), float("nan")), INT4)).isnan().all()


@pytest.mark.numerical
@pytest.mark.skipif(bool(native.unavailable()), reason=f"no native kernels: {native.unavailable()}")
@pytest.mark.parametrize("vectors", [2, 3])
@pytest.mark.parametrize("dim", [32, 96])
@pytest.mark.parametrize("per_token", [1, 5, 37])
def test_native_kernels_compute_with_what_is_stored(vectors: int, dim: int, per_token: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    stored, scales = quantise(torch.randn(50, vectors, dim, generator=generator), INT4)
    ids = torch.randint(50, (7, per_token), generator=generator)

    def outcome(backend: str, rows: torch.Tensor, dtype: torch.dtype, *scales: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.randn(7, dim, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        weights = torch.rand(7, per_token, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        y = api.mix_experts(x, weights, ids, rows, *scales, backend=backend)
        y.square().sum().backward()
        assert x.grad is not None
        assert weights.grad is not None
        return {"y": y.detach(), "x": x.grad, "weights": weights.grad}

    assert_within_budget(
        outcome("cpu", stored, torch.float32, scales),
        outcome("reference", stored, torch.float32, scales),
        outcome("reference", widened(stored, scales).double(), torch.float64),
    )


def test_a_table_is_written_read_and_gathered() -> None:
    table = ExpertTable(9, 64, row_format="int4")
    assert table.row_format == "int4"
    assert table.row_bytes == 2 * (32 + 2 * 4)
    rows = torch.randn(3, 2, 64)
    table.write(rows, 4)
    wanted = widened(*quantise(rows, INT4))
    assert torch.equal(table.read(4, 3), wanted)
    assert torch.equal(table.gather(torch.tensor([6, 4])), wanted[[2, 0]])
    assert torch.equal(table.gather(torch.tensor([6]), 1), wanted[2:, 1])
    table.resize(12)
    assert torch.equal(table.read(4, 3), wanted)
    table.convert_rows("float32")
    assert torch.equal(table.rows[4:7], wanted)
    with pytest.raises(ValueError, match="int4 are not trained"):
        ExpertTable(4, 32, row_format="int4").train_in_place()
    with pytest.raises(ValueError, match="rows of width 48 have no int4 format, whose groups are 32 wide: take int8"):
        PEER(48, num_experts=16, heads=1, experts_per_head=2, key_dim=8, row_format="int4")


def test_a_model_is_converted_saved_and_mapped(tmp_path: Path) -> None:
    config = PeerConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffw_layers="peer",
        peer={"num_experts": 64**2, "heads": 1, "experts_per_head": 4, "key_dim": 8},
    )
    torch.manual_seed(0)
    model = PeerForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "wide")
    source, output = tmp_path / "wide", tmp_path / "narrow"
    assert run("convert-rows", source, output, "--row-format=int4", "--json=-") == 0
    narrow = load_saved(output).eval()
    table = narrow.get_submodule("model.layers.0.ffw.experts")
    assert isinstance(table, ExpertTable)
    assert table.row_format == "int4"
    before = model.get_submodule("model.layers.0.ffw.experts")
    assert isinstance(before, ExpertTable)
    assert torch.equal(table.read(), widened(*quantise(before.read(), INT4)))
    assert native._is_of_a_file(table.rows.data_ptr())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert 0 < relative_error(narrow(ids).logits, model(ids).logits) < 0.5
    assert run("convert-rows", output, tmp_path / "same", "--row-format=int4") == 0
    for name, value in load_saved(tmp_path / "same").state_dict().items():
        assert torch.equal(value, narrow.state_dict()[name]), name
    assert run("convert-rows", output, tmp_path / "back", "--row-format=float32") == 0
    assert torch.equal(load_saved(tmp_path / "back").state_dict()["model.layers.0.ffw.experts.rows"], table.read())
    assert run("convert-rows", source, output, "--row-format=int4") == 2
    assert run("convert-rows", source, tmp_path / "other", "--row-format=int5") == 2


def test_a_converted_model_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = PeerForCausalLM(PeerConfig(**sizes, ffw_layers="dense"))
    convert(model, mode="replace", num_experts=16, heads=1, experts_per_head=2, key_dim=8)
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(UserError, match=r"converted was converted .*: take a model of PEER layers that was trained"):
        convert_rows_of_folder(tmp_path / "converted", tmp_path / "small", "int4")
    assert not (tmp_path / "small").exists()
