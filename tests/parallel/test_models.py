"""Sharded models as others meet them: what they refuse, and packs beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from peerlm.layers import PEER
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.optim import RowAdamW
from peerlm.packs.api import load_pack, new_pack, save_pack
from peerlm.parallel import build, mesh, parallelize, sharded_tables
from peerlm.ranks import Ranks
from peerlm.usage import record_usage

from .together import together

IDS = torch.arange(24).view(2, 12)


def config() -> PeerConfig:
    peer = {"num_experts": 49, "heads": 2, "experts_per_head": 3, "key_dim": 8, "pairing": "shells"}
    return PeerConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffw_layers=["peer"], peer=peer
    )


def weights(rank: int, world: int, rows: int, cols: int) -> dict[str, Tensor]:
    torch.manual_seed(7 if rank == 0 else 8)  # the seed is that of rank 0
    model = build(config(), mesh(rows=rows, cols=cols), dense="replicate")
    with torch.no_grad():
        tables = {f"{name}.rows": table.read() for name, table in sharded_tables(model).items()}
    rest = {name: each.detach().clone() for name, each in model.named_parameters() if name not in tables}
    return {**rest, **tables}


def test_every_mesh_starts_from_the_same_bits() -> None:
    (one,) = together(weights, 1, 1, 1)
    rows = one["model.layers.0.ffw.experts.rows"]
    assert 0.8 < rows[:, 0].std() * 4 < 1.2  # u ~ N(0, 1 / 16)
    assert len(rows.flatten().unique()) > 0.99 * rows.numel()
    for found in together(weights, 4, 2, 2):
        assert found.keys() == one.keys()
        assert all(torch.equal(found[name], one[name]) for name in one)


def refusals(rank: int, world: int, folder: str) -> list[str]:
    """The sentences of what cannot be."""
    ranks = mesh(rows=2)
    model = build(config(), ranks)
    layer = PEER(8, num_experts=49, experts_per_head=2, heads=1, key_dim=4)
    optimizer = RowAdamW(layer.parameters())
    said = []
    for call in (
        lambda: DistributedDataParallel(model),
        lambda: model.state_dict(),
        lambda: new_pack(model, "more", num_experts=4),
        lambda: parallelize(model, ranks),
        lambda: parallelize(layer, ranks),
        lambda: build(config(), ranks, dense="no"),
        lambda: parallelize(PEER(8, num_experts=49, experts_per_head=2, row_format="float8_e4m3fn"), mesh(cols=2)),
        lambda: RowAdamW(build(config(), mesh(rows=1, replica=2)).parameters(), fused=True),
        lambda: parallelize(PEER(9, num_experts=49, experts_per_head=2, heads=1, key_dim=4), mesh(cols=2)),
    ):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    assert optimizer.param_groups
    return said


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for said in together(refusals, 2, str(tmp_path)):
        expected = (
            "cannot train: run `peerlm train`",
            "part of a sharded table under the name of the whole",
            "train it on a model that is not sharded",
            "is sharded already",
            "an optimizer trains experts already",
            "dense is 'no'",
            "float8_e4m3fn rows have scales of whole vectors",
            "before the gradients of the 2 copies of a sharded table are averaged",
            "9 columns cannot be cut over cols = 2",
        )
        assert len(said) == len(expected)
        for sentence, part in zip(said, expected, strict=True):
            assert part in sentence


def with_pack(rank: int, world: int, folder: str) -> tuple[Tensor, Tensor]:
    """Logits with a loaded pack, of the whole model and of the sharded one; tokens differ from rank to rank."""
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(PeerForCausalLM(config()).eval())
        load_pack(models[-1], folder, "more")
    ids = IDS + rank
    with torch.no_grad():
        whole = models[0](input_ids=ids).logits
        return whole, parallelize(models[1], mesh(rows=2), dense="replicate")(input_ids=ids).logits


def test_packs_are_retrieved_beside_sharded_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PeerForCausalLM(config())
    new_pack(model, "more", num_experts=16)
    for name, parameter in model.named_parameters():
        if "packs" in name:
            torch.nn.init.normal_(parameter)
    save_pack(model, "more", tmp_path / "pack")
    for whole, cut in together(with_pack, 2, str(tmp_path / "pack")):
        torch.testing.assert_close(cut, whole)
        assert not torch.equal(whole[0], whole[1])


def used(rank: int, world: int, rows: int, cols: int) -> list[tuple[float, float, int]]:
    """Share, unevenness and counters of a whole model and a sharded one, which read the same tokens between them."""
    found = []
    ids = torch.arange(48).view(4, 12)
    padding = torch.arange(12) < torch.tensor([[12], [9], [12], [5]])
    for sharded in (False, True):
        torch.manual_seed(0)
        model: Any = PeerForCausalLM(config()).eval()
        mine = slice(None)
        if sharded:
            parallelize(model, mesh(rows=rows, cols=cols, replica=world // (rows * cols)), dense="replicate")
            mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        with torch.no_grad(), record_usage(model) as usage:
            model(input_ids=ids[mine], attention_mask=padding[mine].long())
        (layer,) = usage.values()
        layer.merge(Ranks(rank=0, world_size=1, device=torch.device("cpu")))
        found.append((layer.share, layer.unevenness, len(layer.weight_N)))
    return found


@pytest.mark.parametrize(("rows", "cols"), [(2, 2), (2, 1)])
def test_each_rank_counts_the_use_of_its_own_experts(rows: int, cols: int) -> None:
    for rank, (whole, cut) in enumerate(together(used, 4, rows, cols)):
        assert cut[0] == whole[0]
        assert cut[1] == pytest.approx(whole[1], rel=1e-5)
        assert whole[2] == 49
        assert cut[2] == (25, 24)[rank % 2]
