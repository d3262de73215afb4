"""Weights in and out: the Hugging Face <-> Megatron table, readers, writers, conversion."""
