"""What a LoRA adapter is: its rank, its scale, the layers it adapts. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.errors import InputError
from megatron.crystalcoder.model.config import ModelConfig

# The layers that can be adapted, by the ends of their Hugging Face names.
TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_fc2", "mlp.c_proj")


@dataclass(frozen=True)
class LoraSettings:
    """rank r, alpha (the product B A is multiplied by alpha / r), and which layers of every block: names of TARGETS."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise InputError(f"LoRA rank {self.rank}, alpha {self.alpha:g}: both must be above 0")
        if not self.targets or (unknown := [name for name in self.targets if name not in TARGETS]):
            named = f"'{unknown[0]}'" if self.targets else "none"
            raise InputError(f"LoRA target {named}: use some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


def target_shape(config: ModelConfig, target: str) -> tuple[int, int]:
    """(in, out) of a target."""
    h, f = config.hidden_size, config.ffn_hidden_size
    return {
        "attn.c_attn": (h, 3 * h),
        "attn.c_proj": (h, h),
        "mlp.c_fc": (h, f),
        "mlp.c_fc2": (h, f),
        "mlp.c_proj": (f, h),
    }[target]
