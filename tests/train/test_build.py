"""A recipe's model is built for the vocabulary of its data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peerlm import UserError
from peerlm.data import TokenShards
from peerlm.train import TrainConfig
from peerlm.train.build import build_model, new_model


def test_a_model_knows_its_vocabulary_and_the_end_of_text(data: Path, configure: Callable[..., TrainConfig]) -> None:
    shards = TokenShards(data, "train")
    config = build_model(configure(), shards, torch.device("cpu")).config
    assert (config.vocab_size, config.eos_token_id) == (shards.vocab_size, shards.eos_token_id)


def test_without_data_a_vocabulary_is_enough(configure: Callable[..., TrainConfig]) -> None:
    with torch.device("meta"):
        model = new_model(configure(), vocab_size=123)
    assert model.config.vocab_size == 123
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(UserError, match=r"model.vocab_size = 100 is less than the data's 123: leave it out"):
        new_model(configure(model={"vocab_size": 100}), vocab_size=123)
