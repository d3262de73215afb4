"""What a person looks through: the `crystalcoder` command and the tools behind it."""
