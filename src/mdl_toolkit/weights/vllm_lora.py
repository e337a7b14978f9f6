"""Tell what vLLM needs to know of an adapter, and refuse one that it cannot apply beside its base."""

from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.adapter import AdapterDelta

# The ranks for which vLLM makes room.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
TOWERS = ("audio_encoder.blocks.", "audio_projector.")
DECODER = "decoder.model.layers."


@dataclass(frozen=True)
class VllmLora:
    """Hold what vLLM is started with for an adapter.

    Attributes:
        rank: the least of vLLM's ranks that is enough.
        in_towers: the adapter changes the encoder or the projector too.
    """

    rank: int
    in_towers: bool


def read_vllm_lora(adapter: Path, base: Path) -> VllmLora:
    """Read what vLLM needs to know of an adapter.

    Raises:
        ModelError: vLLM cannot apply it, by the name of a part, or it does not fit its base.
    """
    delta = AdapterDelta.read(adapter, base)
    # What low-rank matrices of linear layers in the three parts are not: full copies, DoRA, embeddings.
    others = [*delta.full]
    rank, in_towers = 0, False
    for name, change in delta.low_rank.items():
        is_plain = {*change.entries} == {"lora_A", "lora_B"}
        if not is_plain or not name.startswith((*TOWERS, DECODER)):
            others.append(name)
            continue
        rank = max(rank, change.entries["lora_A"].shape[0])
        in_towers |= name.startswith(TOWERS)
    if others:
        raise ModelError(
            "{adapter}: vLLM cannot apply what this adapter does to {name}, only LoRA of linear layers; make "
            "one model of it with `mdl-toolkit merge`",
            adapter=adapter,
            name=others[0].removesuffix(".weight"),
        )
    if rank > RANKS[-1]:
        raise ModelError(
            "{adapter}: its rank {rank} is above the {most} that vLLM takes; make one model of it with "
            "`mdl-toolkit merge`",
            adapter=adapter,
            rank=rank,
            most=RANKS[-1],
        )
    return VllmLora(next(each for each in RANKS if each >= rank), in_towers)
