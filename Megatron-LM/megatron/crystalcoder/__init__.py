"""CrystalCoder on megatron-core: the model, its data, its training loop and its checkpoints.

A portion of the `megatron` namespace, installed beside the wheel's `megatron.core`.
"""

import warnings

# megatron-core says on import, five times, what it falls back to; here nothing needs either of the two.
warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex (is|are) not installed", module=r"megatron\.core")
# What torch will call otherwise one day, as megatron-core still calls it: nothing that who trains can do about.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")
