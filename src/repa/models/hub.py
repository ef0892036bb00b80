"""A network as a folder, here or on the Hugging Face hub: config.json and model.safetensors, as `repa export` writes them.

Not by PyTorchModelHubMixin of huggingface_hub: it writes its own config.json over the constructor's arguments, which
`repa export` does not, and a model card that needs jinja2, which the core does not bring.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa.base import files, lock
from repa.base.errors import UserError
from repa.base.hub import CONFIG, Repository
from repa.models.contract import Backbone
from repa.models.layers import Block

if TYPE_CHECKING:
    from repa.models.dit import DiT


class OnHub(Backbone):
    """What users of `transformers` and `diffusers` know, for DiT."""

    separate_times: bool
    patch_overlap: int

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> "DiT":
        """The network of a folder, of `repa export` or `save_pretrained`, or of a repository of the hub; in eval mode, trainable.

        Raises:
            UserError: there is no such folder or repository, or it holds another kind of network.
        """
        # Imported here: it builds a DiT, which is made of this class.
        from repa.models.exported import WEIGHTS, load_exported

        folder = Path(name)
        if not folder.is_dir():
            repository = Repository("network", str(name), ((CONFIG,), (WEIGHTS,)), "give a folder of `repa export`")
            folder = repository.fetched(revision=revision, token=token)
        return load_exported(folder).requires_grad_(True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a new folder; UserError for a network that routes tokens."""
        from repa.models.exported import WEIGHTS, save_exported

        folder = Path(folder)
        with lock.exclusive(folder, "save_pretrained"), files.new_folder(folder, WEIGHTS, "the network") as temporary:
            save_exported(temporary, self.state_dict(), self._arguments(), {})

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub, which is made if it is not there; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "network")
            commit = api.upload_folder(
                repo_id=name, folder_path=Path(folder) / "network", commit_message="A network of repa"
            )
        return str(commit.commit_url)

    def _arguments(self) -> dict[str, Any]:
        """Those of the constructor."""
        from repa.models.published import constructor_arguments

        if self.route:
            raise UserError("A network that routes tokens is saved with its run: `repa export RUN FOLDER`.")
        block = self.blocks[0]
        assert isinstance(block, Block)
        read = constructor_arguments(self.state_dict(), block.attn.num_heads, self.patch_overlap)
        # What leaves no trace in a state dict: the sides of a grid that is no square, and who may look at whom.
        return {**read, "latent_size": list(self.state_shapes["x"][1:]), "separate_times": self.separate_times}
