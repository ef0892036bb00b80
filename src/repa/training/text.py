"""What a batch is conditioned on: labels, and where the network reads text one caption of each image as tokens."""

import torch

from repa.alignment import AlignmentConfig
from repa.base.errors import UserError
from repa.base.precision import DTYPES, autocast
from repa.base.registry import parse_spec
from repa.conditions import Text, load_text_encoder
from repa.data import Batch, DataSet
from repa.models import Condition
from repa.models.config import reads_text
from repa.training.config import TrainConfig


def chosen_text(config: TrainConfig, data: DataSet) -> str:
    """The text encoder of a run: the one asked for, else that of the stored tokens; "" for a network that reads none.

    Raises:
        UserError: the network reads text, and the data has none; or another one does not, and is given a text encoder.
    """
    stored = data.manifest.config.text if data.text else ""
    if not reads_text(config.model.backbone) and not config.text:
        return ""
    if not data.has_captions:
        raise UserError(
            f"The backbone {config.model.backbone!r} reads text, but the data in {data.folder} has no captions: give data that "
            "`repa prepare --text NAME` made."
        )
    if not (config.text or stored):
        raise UserError(
            f"The backbone {config.model.backbone!r} reads text, but the data in {data.folder} holds captions without tokens: run "
            f"`repa prepare {data.folder} --only text --text NAME`, or give --text NAME to encode them while training."
        )
    return config.text or stored


class TextConditions:
    """Conditions of batches. Tokens are read with the batch where the data has them of this encoder; else it runs on the captions.

    Attributes:
        reads: what the loader is to read: "" nothing, "tokens", or "captions".
        identity: of the text encoder, which the run records; None where no text is read.
        empty: the tokens of the empty text, which stands for "no text"; None as above, or where only targets read text.
        width: of the tokens; 0 where no text is read.
    """

    def __init__(self, config: TrainConfig, data: DataSet, device: torch.device):
        self.device, self.precision, self.encoder = device, config.precision, None
        self.reads, self.identity, self.empty, self.width = "", None, None, 0
        if not config.text:
            if any(parse_spec(term.target)[0] == "text" for term in config.alignments):
                self._read_for_targets(data)
            return
        if data.text and data.manifest.config.text == config.text:
            self.reads, self.identity = "tokens", data.text.identity
            self.empty: Text | None = data.texts.empty().text().map(lambda x: x.to(device))
        else:
            self.encoder = load_text_encoder(config.text, weights=config.text_weights or None, device=device)
            self.reads, self.identity = "captions", self.encoder.identity
            if config.precision in DTYPES:
                self.encoder.round_weights(DTYPES[config.precision])
            self.empty = self._encode([""])
        self.width = self.empty.tokens.shape[2]

    def completed(self, config: TrainConfig) -> TrainConfig:
        """With the shape of the text, which the network and terms with the target text are built for."""
        if self.width:
            config = config.override(alignments=[_with_width(term, self.width) for term in config.alignments])
        if self.empty is None:
            return config
        found, asked = tuple(self.empty.tokens.shape[1:]), config.model.text_shape
        if asked != (0, 0) and asked != found:
            raise UserError(f"model.text_shape is {asked}, but {config.text} gives {found}: leave it out.")
        return config.override(model=config.model.override(text_shape=found))

    def _read_for_targets(self, data: DataSet) -> None:
        """Stored tokens, for terms whose target is text, of a network that reads none."""
        if not data.text:
            raise UserError(
                f"A term has the target text, but the data in {data.folder} holds no tokens of captions: run "
                f"`repa prepare {data.folder} --only text --text NAME`, or prepare data with captions."
            )
        self.reads, self.width = "tokens", data.texts.empty().text().tokens.shape[2]

    def __call__(self, batch: Batch) -> Condition:
        """The condition of the images of a batch."""
        if not self.reads:
            return Condition(batch.labels)
        text = self._encode(batch.captions) if self.encoder else batch.text
        return Condition(batch.labels, text.tokens, text.mask)

    def _encode(self, texts: list[str]) -> Text:
        with autocast(self.device, self.precision):
            return self.encoder(texts)


def _with_width(term: AlignmentConfig, width: int) -> AlignmentConfig:
    """A target text that says how wide the tokens of the data are."""
    name, settings = parse_spec(term.target)
    return term if name != "text" or "width" in settings else term.override(target=f"text:width={width}")
