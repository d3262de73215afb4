"""CrystalCoder on megatron-core: configuration, layers, muP, initialisation."""
