"""transformers' tests of causal language models, with ours."""

import unittest
from typing import Any

import torch
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from tests.test_training_mixin import TrainingTesterMixin
from transformers.testing_utils import _TEXT_MODEL_TESTER_DEFAULTS

from peerlm.model import PeerConfig, PeerForCausalLM, PeerModel

try:
    from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
except ModuleNotFoundError:  # it is not in the source distribution

    class CausalLMModelTester:  # type: ignore[no-redef]
        """Sizes and inputs of a tiny model."""

        def __init__(self, parent: unittest.TestCase):
            self.parent = parent
            for name, value in _TEXT_MODEL_TESTER_DEFAULTS.items():
                setattr(self, name, value)

        def get_config(self) -> PeerConfig:
            """Of those sizes."""
            known = PeerConfig.__annotations__
            return PeerConfig(**{name: getattr(self, name) for name in known if hasattr(self, name)})

        def prepare_config_and_inputs_for_common(self) -> tuple[PeerConfig, dict[str, Any]]:
            """A configuration, and arguments of a forward pass."""
            config = self.get_config()
            input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return config, {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}

    class CausalLMModelTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):  # type: ignore[no-redef]
        """Tests of models and of training."""

        model_tester_class: type[CausalLMModelTester]
        all_model_classes = (PeerModel, PeerForCausalLM)
        all_generative_model_classes = (PeerForCausalLM,)

        def setUp(self) -> None:
            """As transformers' own."""
            self.model_tester = self.model_tester_class(self)  # type: ignore[arg-type]


class PeerModelTester(CausalLMModelTester):
    """A tiny model with one kind of feed-forward layer in every block."""

    base_model_class = PeerModel
    config_class = PeerConfig
    causal_lm_class = PeerForCausalLM
    ffw_layers = "peer"
    peer = {"num_experts": 64, "heads": 2, "experts_per_head": 4, "key_dim": 8}  # noqa: RUF012, as the base class
    pkm = {"num_values": 64, "heads": 2, "values_per_head": 4, "key_dim": 8}  # noqa: RUF012
    token_choice = {"num_experts": 4, "hidden": 16}  # noqa: RUF012


class MemoryModelTester(PeerModelTester):
    """With product-key memory."""

    ffw_layers = "pkm"


class MixtureModelTester(PeerModelTester):
    """With a mixture of large experts."""

    ffw_layers = "token_choice"


class PeerModelTest(CausalLMModelTest, unittest.TestCase):
    """PEER in every block."""

    model_tester_class = PeerModelTester
    _torch_compile_train_cls = PeerForCausalLM


class MemoryModelTest(CausalLMModelTest, unittest.TestCase):
    """Product-key memory in every block."""

    model_tester_class = MemoryModelTester
    _torch_compile_train_cls = PeerForCausalLM


class MixtureModelTest(CausalLMModelTest, unittest.TestCase):
    """Token choice in every block."""

    model_tester_class = MixtureModelTester
    _torch_compile_train_cls = PeerForCausalLM


del CausalLMModelTest  # which is no test by itself
