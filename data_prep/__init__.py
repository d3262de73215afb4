"""Raw corpora to shuffled HDF5 sequences. Knows text and files; never imports torch."""
