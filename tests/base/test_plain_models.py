"""Configurations of models that would fetch code, or build layers without end, are refused before anything is built."""

import pytest

from repa.base.errors import UserError
from repa.base.trust import require_plain_model


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "owner/kernel"}, {"vision_config": {"attn_implementation": {"": "owner/kernel"}}},
        {"parts": [{"quantization_config": {}}]}, {"use_kernels": False}, {"num_hidden_layers": 2**40}, {"decoder_num_hidden_layers": 1001},
    ],
)  # fmt: skip
def test_what_fetches_code_or_never_ends_is_refused(values):
    with pytest.raises(UserError, match=r"x/config\.json"):
        require_plain_model(values, "x/config.json")


def test_what_models_have_is_left_alone():
    require_plain_model(
        {"quantization_config": None, "num_hidden_layers": 48, "layers_per_block": [2, 2], "vocab_size": 256_000}, "x"
    )
    require_plain_model([1, "a", None], "x")
