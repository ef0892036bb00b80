"""Every kind of text encoder from a tiny random checkpoint, compared with transformers on unpadded text."""

import contextlib
import json

import pytest
import torch
import transformers

from repa.base.errors import UserError
from repa.conditions import TEXT_ENCODERS, Text, TextEncoder, load_text_encoder
from tests.conditions.hub import make
from tests.hostile.mutations import mutated_tree

TEXTS = ["a red cup", "", "two dogs on the grass, a very close crop of the dark moon and of more " + "bricks " * 90]
every = pytest.mark.parametrize("name", ["clip-l", "clip-h", "t5-xxl", "qwen3-0.6b"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("text")
    kinds = {name: make(name, root / name) for name in ("clip-l", "t5-xxl", "qwen3-0.6b")}
    return {**kinds, "clip-h": kinds["clip-l"]}


def hidden_of(name, folder, text, length, layer=0):
    """Hidden states of one text from transformers, without padding where padding is masked."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padded = {"padding": "max_length"} if name.startswith("clip") else {}
    ids = tokenizer([text], truncation=True, max_length=length, return_tensors="pt", **padded)["input_ids"]
    kind, part = {
        "clip": ("CLIPModel", "text_model"), "t5": ("T5EncoderModel", ""), "qwen3": ("Qwen3ForCausalLM", "model"),
    }[name.partition("-")[0]]  # fmt: skip
    model = getattr(transformers, kind).from_pretrained(folder).eval().get_submodule(part)
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    return (output.hidden_states[layer] if layer else output.last_hidden_state)[0]


@every
def test_features_equal_those_of_transformers(folders, name):
    encoder = load_text_encoder(name, weights=folders[name])
    text = encoder(TEXTS)
    length = {"clip": 77}.get(name.partition("-")[0], 120)
    assert (encoder.num_tokens, encoder.dim, encoder.masked) == (length, 16, not name.startswith("clip"))
    assert text.tokens.shape == (3, length, 16)
    assert text.tokens.dtype == torch.float32
    for row in (0, 2):
        wanted = hidden_of(name, folders[name], TEXTS[row], length)
        torch.testing.assert_close(text.tokens[row, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
        if encoder.masked:
            assert int(text.mask[row].sum()) == len(wanted)
            assert not text.tokens[row, len(wanted) :].any()
    assert text.mask is None or int(text.mask[1].sum()) == 1  # for "": its end token, or padding
    assert text.tokens.isfinite().all()
    torch.testing.assert_close(encoder(TEXTS[:1]).tokens, text.tokens[:1], rtol=1e-4, atol=1e-5)
    assert not encoder.train().training
    assert not any(p.requires_grad for p in encoder.parameters())


@every
def test_weights_rounded_to_bf16_equal_autocast(folders, name):
    plain, rounded = (load_text_encoder(name, weights=folders[name]) for _ in range(2))
    rounded.round_weights(torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32, torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rounded(TEXTS).tokens, plain(TEXTS).tokens, rtol=0, atol=0)


def test_settings_choose_layer_and_number_of_tokens(folders):
    encoder = load_text_encoder("clip-l:tokens=9,layer=1", weights=folders["clip-l"])
    text = encoder(TEXTS)
    assert text.tokens.shape == (3, 9, 16)
    torch.testing.assert_close(text.tokens[0], hidden_of("clip-l", folders["clip-l"], TEXTS[0], 9, layer=1))
    plain = load_text_encoder("clip-l", weights=folders["clip-l"]).identity
    assert {key for key in plain if plain[key] != encoder.identity[key]} == {"preprocessing"}
    for wrong in ("clip-l:layer=3", "clip-l:tokens=78", "clip-l:tokens=2.5", "clip-l:block=1", "clip-x"):
        with pytest.raises(UserError):
            load_text_encoder(wrong, weights=folders["clip-l"])


def test_missing_or_wrong_files_are_named(folders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        load_text_encoder("clip-l", weights=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json"):
        load_text_encoder("clip-l", weights=tmp_path)
    with pytest.raises(UserError, match="'clip'"):
        load_text_encoder("t5-b", weights=folders["clip-l"])
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="could not be downloaded from the hub"):
        load_text_encoder("t5-b")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_damaged_files_give_a_one_line_error(folders, tmp_path, file):
    for path in folders["t5-xxl"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        load_text_encoder("t5-xxl", weights=tmp_path)


def test_missing_weights_are_refused_rather_than_random(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in folders["t5-xxl"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("encoder.block.0.layer.0.SelfAttention.q.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights"):
        load_text_encoder("t5-xxl", weights=tmp_path)


def test_code_in_a_folder_does_not_run(folders, tmp_path):
    for path in folders["qwen3-0.6b"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with contextlib.suppress(UserError):
        load_text_encoder("qwen3-0.6b", weights=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_tiny_text_hashes_words():
    encoder = load_text_encoder("tiny-text:tokens=5,width=32")
    text = encoder(["A red CUP!", "cup red", "", "one two three four five six"])
    assert text.mask.sum(1).tolist() == [4, 3, 1, 5]
    assert not text.tokens[~text.mask].any()
    plain = text.tokens - encoder.positions
    torch.testing.assert_close(plain[0, 2], plain[1, 2])  # "red"
    torch.testing.assert_close(plain[0, 3], plain[1, 1])  # "cup"
    torch.testing.assert_close(plain[0, 0], plain[2, 0])
    assert abs(float(torch.cosine_similarity(plain[0, 2], plain[0, 3], dim=0))) < 0.6
    assert torch.equal(load_text_encoder("tiny-text:tokens=5,width=32")(["cup red"]).tokens, text.tokens[1:2])
    for wrong in ("tiny-text:tokens=0", "tiny-text:width=3", "tiny-text:tokens=x"):
        with pytest.raises(UserError):
            load_text_encoder(wrong)
    with pytest.raises(UserError, match="no weights"):
        load_text_encoder("tiny-text", weights="tests")


class Lengths(TextEncoder):
    """A user's encoder: the number of letters."""

    name, dim, num_tokens, masked = "lengths", 1, 1, False
    identity = {"name": "lengths"}  # noqa: RUF012

    def encode(self, texts):
        return Text(torch.tensor([[[float(len(text))]] for text in texts]), None)


def load_lengths(name, weights):
    return Lengths()


def load_wrong(name, weights):
    return {}


def test_private_encoders_load_by_dotted_name():
    encoder = load_text_encoder(f"{__name__}.load_lengths")
    assert encoder(["abc", ""]).tokens.flatten().tolist() == [3, 0]
    with pytest.raises(UserError, match="TextEncoder"):
        load_text_encoder(f"{__name__}.load_wrong")
    encoder.num_tokens = 2
    with pytest.raises(UserError, match=r"= \(2, 2, 1\) without a mask .* but returned \(2, 1, 1\) and None"):
        encoder(["abc", ""])
    encoder.encode = lambda texts: torch.zeros(len(texts), 2, 1)
    with pytest.raises(UserError, match="but returned None"):
        encoder(["abc"])
    assert {"clip-l", "clip-h", "t5-xxl", "qwen3-0.6b", "tiny-text"} <= set(TEXT_ENCODERS)


def copied(folder, out, file="", **changes):
    """A copy of the folder with foreign settings in one of its JSON files."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    if file:
        values = json.loads((out / file).read_text()) if (out / file).exists() else {}
        (out / file).write_text(json.dumps({**values, **changes}))
    return out


def test_a_configuration_that_would_download_code_is_refused(folders, tmp_path):
    hostile = (
        {"attn_implementation": "evil/kernel"}, {"quantization_config": {"quant_method": "gptq"}}, {"use_kernels": True},
        {"text_config": {"attn_implementation": "evil/kernel"}}, {"num_layers": 2**31}, {"num_layers": 900},
        {"d_model": 2**17}, {"vocab_size": 2**40}, {"num_labels": 2**31},
    )  # fmt: skip
    for number, changes in enumerate(hostile):
        with pytest.raises(UserError, match=r"config\.json"):
            load_text_encoder(
                "t5-xxl", weights=copied(folders["t5-xxl"], tmp_path / str(number), "config.json", **changes)
            )
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "target_modules": ["q"]}
    with pytest.raises(UserError, match="merge the adapter"):
        load_text_encoder("t5-xxl", weights=copied(folders["t5-xxl"], tmp_path / "a", "adapter_config.json", **adapter))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_changed_folders_give_a_one_line_error(folders, tmp_path, file):
    for number in range(16):
        name = ("clip-l", "t5-xxl")[number % 2]
        folder = copied(folders[name], tmp_path / str(number))
        (folder / file).write_text(json.dumps(mutated_tree(json.loads((folder / file).read_text()), number)))
        with contextlib.suppress(UserError):
            load_text_encoder(name, weights=folder)(["a cat", ""])
