"""Frozen text encoders, which encode captions and prompts for a network."""

from typing import TYPE_CHECKING

from repa.base.imports import exports
from repa.base.registry import Registry
from repa.conditions.loading import about, text_encoder_names

# f(name, weights, **settings) -> TextEncoder; also the dotted name of such a function
TEXT_ENCODERS = Registry(
    "text encoder",
    {
        "tiny-text": "repa.conditions.encoders:load_words",
        **dict.fromkeys(text_encoder_names(), "repa.conditions.encoders:load_hub"),
    },
    listing="text-encoders",
    takes=("name", "weights"),
    facts={name: about(name) for name in text_encoder_names()},
)

if TYPE_CHECKING:
    from repa.conditions.contract import Text as Text
    from repa.conditions.contract import TextEncoder as TextEncoder
    from repa.conditions.loading import load_text_encoder as load_text_encoder
else:
    __getattr__, __dir__, __all__ = exports(__name__, local=("TEXT_ENCODERS",))
