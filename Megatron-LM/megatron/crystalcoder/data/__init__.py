"""HDF5 sequences to batches: which row at which step, and how it is read."""
