"""One training loop and its two front doors: Megatron flags and params.yaml."""
