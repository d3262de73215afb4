"""Adam's moments in 2 or 1 bytes a number instead of 4.

    bf16   m and v, rounded to 8 significant bits
    8bit   m and sqrt(v) in e4m3 (4 significant bits), 256 numbers sharing a power of two, the smallest that makes them
           fit (Rouhani et al. 2023, "Microscaling Data Formats"; the root halves the range that v's numbers span)

A moment moves by a few percent a step, less than half of such a format's spacing, so rounding to the nearest would keep
it where it is. It is rounded up or down by chance instead, on average to what it was (Gupta et al. 2015, "Deep Learning
with Limited Numerical Precision"). The chance is a function of seed and position: the same for every copy of a
parameter, and after a resume.

Unpacked moments are fp32 and lose nothing: packing them again gives the same numbers, whatever the seed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.crystalcoder.training.memory import OptimizerStates

# Numbers that share a power of two.
BLOCK = 256


class Packed(NamedTuple):
    """One moment. exponents: int8, the power of two of each block of 8bit numbers; empty in bf16."""

    numbers: Tensor
    exponents: Tensor


def packed_zeros(count: int, kind: OptimizerStates, device: torch.device) -> Packed:
    """A moment of `count` numbers before the first step."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn
    blocks = -(-count // BLOCK) if kind == "8bit" else 0
    return Packed(torch.zeros(count, dtype=dtype, device=device), torch.zeros(blocks, dtype=torch.int8, device=device))


def pack(values: Tensor, kind: OptimizerStates, seed: Tensor) -> Packed:
    """fp32 (n,) to a moment; for 8bit and v, give its root. seed: int32 ()."""
    chance = _chances(len(values), seed)
    if kind == "bf16":
        return Packed(
            _rounded(values, chance, mantissa=7, smallest=-119).bfloat16(), values.new_empty(0).to(torch.int8)
        )
    count, blocks = len(values), -(-len(values) // BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    exponents = _exponent_that_fits(padded.abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max)
    scaled = (padded * _power_of_two(-exponents)[:, None]).view(-1)[:count]
    numbers = _rounded(scaled, chance, mantissa=3, smallest=-6).to(torch.float8_e4m3fn)
    return Packed(numbers, exponents.to(torch.int8))


def unpack(packed: Packed) -> Tensor:
    """fp32 (n,)."""
    values = packed.numbers.float()
    if len(packed.exponents):
        values *= _power_of_two(packed.exponents.int()).repeat_interleave(BLOCK)[: len(values)]
    return values


def _rounded(x: Tensor, chance: Tensor, *, mantissa: int, smallest: int) -> Tensor:
    """To `mantissa` bits after the leading one, for numbers below 2^smallest to those of 2^smallest: up with the chance
    that makes the average right. A number that fits stays. NaN and infinity do, too."""
    exponent = _floor_log2(x).clamp(min=smallest) - mantissa
    # By the inverse, which is exact: a GPU's compiled division need not be.
    rounded = torch.floor(x * _power_of_two(-exponent) + chance) * _power_of_two(exponent)
    return torch.where(torch.isfinite(x), rounded, x)


def _chances(count: int, seed: Tensor) -> Tensor:
    """Numbers in [0, 1), fp32 (n,), that look random: a hash of seed and position (Wellons 2018, "lowbias32").

    They have 16 bits, so that one added to a number of 8 bits is never rounded up to the next.
    """
    x = torch.arange(count, dtype=torch.int32, device=seed.device) + seed
    for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975), (16, 1)):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return ((x >> 8) & 0xFFFF).float() * 2.0**-16


def _floor_log2(x: Tensor) -> Tensor:
    """Of fp32 |x|, int32; -127 for 0 and for subnormal numbers."""
    return ((x.view(torch.int32) >> 23) & 255) - 127


def _exponent_that_fits(x: Tensor) -> Tensor:
    """The smallest e with x <= 2^e, int32, of -126 to 126."""
    is_power = (x.view(torch.int32) & 0x7FFFFF) == 0
    return (_floor_log2(x) + (~is_power).int()).clamp(-126, 126)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^e, fp32, for int32 e of -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)
