"""The conventions of released checkpoints in terms of the literal network."""

from tests.oracles import dit


def sit_velocity(state, x_t, t_sit, labels, num_heads):
    """SiT: t = 1 is data, velocity = data - noise, and the second half of the output channels is dropped."""
    channels = x_t.shape[1]
    return dit.forward(state, x_t, t_sit, labels, num_heads)[0][:, :channels]


def legacy_repa(state, depth):
    """A REPA checkpoint of older code, where the blocks after `depth` are decoder_blocks, numbered from 0."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            number, rest = key.removeprefix("blocks.").split(".", 1)
            if int(number) >= depth:
                key = f"decoder_blocks.{int(number) - depth}.{rest}"
        renamed[key] = value
    return renamed
