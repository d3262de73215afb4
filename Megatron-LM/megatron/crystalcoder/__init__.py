"""CrystalCoder on megatron-core: the model, its data, its training loop and its checkpoints.

A portion of the `megatron` namespace, installed beside the wheel's `megatron.core`.
"""
