import pytest

from repa.base.errors import UserError
from repa.models.config import ModelConfig, model_names


def test_dimensions_follow_the_name_unless_overridden():
    assert ModelConfig(name="SiT-XL/2").dims() == (1152, 28, 16, 2)
    assert ModelConfig(name="DiT-S/8").dims() == (384, 12, 6, 8)
    assert ModelConfig(name="SiT-L/4", depth=3, hidden_dim=32, num_heads=2).dims() == (32, 3, 2, 4)
    assert len(model_names()) == len(set(model_names())) == 38


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "SiT-B-2"}, "Did you mean 'SiT-B/2'"),
        ({"name": "SiT-B/3"}, r"patch size \(1, 2, 4, 8\)"),
        ({"hidden_dim": 100}, "num_heads 12"),
        ({"latent_size": 33}, "latent_size 33 cannot be cut into patches of 2"),
        ({"depth": -1}, "'depth' is -1"),
        ({"dept": 4}, "Did you mean 'depth'"),
    ],
)
def test_invalid_input_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.parse(values)


def test_the_yaml_gives_the_same_configuration():
    import yaml

    config = ModelConfig(name="SiT-S/4", latent_size=8, qk_norm="layer")
    assert ModelConfig.parse(yaml.safe_load(config.to_yaml())) == config
