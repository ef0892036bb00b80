"""Model configurations that would download code or build endless layers are refused before anything is built."""

import json

import pytest

from repa.base.errors import UserError
from repa.base.trust import require_own_weights, require_plain_model


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "owner/kernel"}, {"vision_config": {"attn_implementation": {"": "owner/kernel"}}},
        {"parts": [{"quantization_config": {}}]}, {"use_kernels": False}, {"num_hidden_layers": 2**40}, {"decoder_num_hidden_layers": 1001},
        {"layers_per_block": [2, 10**6]}, {"num_encoder_blocks": [1, [1, 10**6]]}, {"depth": 10**6}, {"depths": [3, 10**6]},
    ],
)  # fmt: skip
def test_configurations_that_fetch_code_or_are_unbounded_are_refused(values):
    with pytest.raises(UserError, match=r"x/config\.json"):
        require_plain_model(values, "x/config.json")


def test_ordinary_configurations_are_accepted():
    require_plain_model(
        {"quantization_config": None, "num_hidden_layers": 48, "layers_per_block": [2, 2], "vocab_size": 256_000}, "x"
    )
    require_plain_model([1, "a", None], "x")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "", 3, None])
def test_weight_files_in_other_folders_are_refused(name, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    require_own_weights(tmp_path)
    path.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": name}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is refused"):
        require_own_weights(tmp_path)
