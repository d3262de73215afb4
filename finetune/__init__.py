"""Conversations to masked HDF5 sequences: the chat format, the loss mask, packing."""
