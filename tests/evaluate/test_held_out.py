import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from peerlm.evaluate import held_out_loss
from peerlm.model import PeerConfig, PeerForCausalLM
from peerlm.ranks import Ranks
from peerlm.usage import record_usage

from ..processes import ranks


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
@pytest.mark.usefixtures("float64")
def test_it_is_the_mean_loss_over_windows(model, batch_size):
    windows = torch.randint(300, (7, 12))
    expected = model(input_ids=windows, labels=windows).loss.item()
    assert held_out_loss(model, windows, batch_size=batch_size) == pytest.approx(expected)


@pytest.mark.usefixtures("float64")
def test_a_limit_reads_the_first_windows(model):
    windows = torch.randint(300, (7, 12))
    with record_usage(model) as usage:
        loss = held_out_loss(model, windows, batch_size=2, limit=3)
    assert loss == pytest.approx(held_out_loss(model, windows[:3], batch_size=3))
    (recorded,) = usage.values()
    assert recorded.retrievals_N.sum() == 3 * 11 * 2 * 4
    assert held_out_loss(model, windows, batch_size=2, limit=100) == held_out_loss(model, windows, batch_size=2)


def test_training_goes_on_where_it_was_and_balance_losses_do_not_count():
    config = PeerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffw_layers="token_choice",
        balance_loss_coefficient=1e3,
    )
    model = PeerForCausalLM(config).train()
    windows = torch.randint(50, (4, 8))
    with torch.no_grad():
        balanced = model(input_ids=windows, labels=windows).loss
    loss = held_out_loss(model, windows, batch_size=4)
    assert model.training
    assert loss < 10 < balanced
    model(input_ids=windows, labels=windows).loss.backward()


def test_the_mode_is_restored_after_an_exception(model):
    model.train()
    try:
        with pytest.raises(IndexError):
            held_out_loss(model, torch.full((1, 4), 300), batch_size=1)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(("num_windows", "limit"), [(0, None), (3, 0)])
def test_no_windows_are_refused(model, num_windows, limit):
    with pytest.raises(ValueError, match=f"{num_windows} held-out windows with limit {limit}"):
        held_out_loss(model, torch.zeros(num_windows, 4, dtype=torch.int64), batch_size=2, limit=limit)


@pytest.fixture
def two_ranks():
    """This process is rank 0 of two, of which the other is feigned."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("float64", "two_ranks")
def test_a_process_among_others_reads_all_windows_unless_ranks_are_given(model):
    windows = torch.randint(300, (5, 12))
    expected = model(input_ids=windows, labels=windows).loss.item()
    assert held_out_loss(model, windows, batch_size=5) == pytest.approx(expected)


def share_windows(folder):
    dist.init_process_group("gloo")
    model, windows = torch.load(folder / "shared.pt", weights_only=False)
    ranks_of_two = Ranks(rank=dist.get_rank(), world_size=2, device=torch.device("cpu"))
    print(held_out_loss(model, windows, batch_size=2, ranks=ranks_of_two))  # noqa: T201
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_windows_and_agree(model, tmp_path):
    windows = torch.randint(300, (5, 12))
    torch.save((model, windows), tmp_path / "shared.pt")
    with ranks(2, tmp_path, share_windows, tmp_path) as both:
        assert both.wait() == [0, 0], both.said()
        losses = [float(said) for said in both.said()]
    assert losses[0] == losses[1] == pytest.approx(held_out_loss(model, windows, batch_size=2), rel=1e-12)
