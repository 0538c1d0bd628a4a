"""The opening of a grown layer is asked of its device only where it has changed."""

import copy

import pytest
import torch

from peerlm.growth import grow, set_opening
from peerlm.layers import PEER
from peerlm.ops import tensors

from ..host_reads import NoHostReads


def test_a_partly_open_layer_waits_for_a_device_only_where_its_opening_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = PEER(8, num_experts=16, heads=3, experts_per_head=3, key_dim=6, pairing="shells"), torch.randn(4, 8)
    layer = grow(layer, 49).eval()
    for opening in (0.0, 0.25, 0.5):
        expected = set_opening(layer, opening)(x)
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "read_at_once", lambda device: False)
            with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
                layer(x)
            assert torch.equal(layer(x), expected)
            with NoHostReads():
                assert torch.equal(layer(x), expected)
    copied = copy.deepcopy(layer)
    set_opening(copied, 0.75)
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "read_at_once", lambda device: False)
        assert torch.equal(layer(x), expected)
        assert not torch.equal(copied(x), expected)
