"""Which parts of the model run fused, by name. No torch here.

The plain way of every part stays: it is what the fused one is tested against, and `--fusions none` trains with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from data_prep.errors import InputError

# name -> what is fused
FUSIONS: dict[str, str] = {
    "attention": "scores, causal mask, softmax and weighted sum in one kernel (torch's scaled_dot_product_attention)",
    "norm": "bias, residual and LayerNorm in one pass",
    "swiglu": "both halves in one pass, nothing kept for the backward pass but their input",
    "rotary": "queries and keys turned in place",
    "loss": "logits, their scale and cross-entropy by chunks, without the whole batch's fp32 logits",
    "wgrad": "weight gradients added straight to the fp32 main gradients; biases added inside the product",
    "adamw": "clipping, leaving out a step that is not finite, and AdamW in one pass, decided on the device",
}

Compile = Literal["auto", "off", "ops"]
Fp8 = Literal["off", "on", "emulated"]
# Bytes from which on a tensor that is saved for the backward pass goes to the host's memory, where that is asked for.
OFFLOADED_FROM = 1 << 20


@dataclass(frozen=True)
class Speed:
    """How the model's mathematics is carried out; no setting changes the result beyond rounding (fp8's is coarse).

    fusions: names from FUSIONS. compile: the fused passes by torch.compile one by one (ops),
    or none of it (off); auto is ops on a GPU, off on a CPU. loss_chunk: tokens whose logits are worked on at a time; 0:
    as many as suit the device. fp8: products of the linear layers inside the blocks in 8-bit floating point (on), or
    the same numbers on a machine without them (emulated). offload: what the layers save for their backward pass waits
    for it in the host's memory.
    """

    fusions: frozenset[str] = frozenset(FUSIONS)
    compile: Compile = "auto"
    loss_chunk: int = 0
    fp8: Fp8 = "off"
    offload: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(self.fusions - set(FUSIONS))
        if unknown:
            raise InputError(f"unknown fusion '{unknown[0]}': use all, none, or some of {', '.join(FUSIONS)}")
        if self.loss_chunk < 0:
            raise InputError(f"loss chunk {self.loss_chunk}: must be a number of tokens, or 0")
        if self.fp8 != "off" and "wgrad" not in self.fusions:
            raise InputError("--fp8 needs the fusion wgrad, whose linear layers it is part of: leave that in --fusions")

    def resolved(self, *, cuda: bool) -> Speed:
        """With `auto` decided for this device."""
        return self if self.compile != "auto" else replace(self, compile="ops" if cuda else "off")

    @property
    def compiles_ops(self) -> bool:
        """Whether the fused passes are compiled one by one."""
        return self.compile == "ops"


def parse_fusions(text: str) -> frozenset[str]:
    """`all`, `none`, `norm,swiglu`, or all but some: `all,-loss`. Raises InputError for an unknown name."""
    chosen: set[str] = set()
    for word in filter(None, (word.strip() for word in text.split(","))):
        name = word.removeprefix("-")
        names: Iterable[str] = {"all": FUSIONS, "none": ()}.get(name, (name,))
        if not set(names) <= set(FUSIONS):
            raise InputError(f"unknown fusion '{name}': use all, none, or some of {', '.join(FUSIONS)}")
        chosen = chosen - set(names) if word.startswith("-") else chosen | set(names)
    return frozenset(chosen)
