"""Pretraining, phases 1 to 3, from a params.yaml: run it through torchrun, or alone for one rank. --help lists all."""

from __future__ import annotations

import sys
from pathlib import Path

# Run from a checkout that is not installed: the two places that packaging puts on the path.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


if __name__ == "__main__":
    from megatron.crystalcoder.training.pretrain import main

    main()
