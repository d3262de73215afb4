"""Instruction tuning with Megatron-LM's flags: run it through torchrun, or by rank_cmd_phase2.sh. --help lists them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Run from a checkout that is not installed: the two places that packaging puts on the path.
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


def main() -> None:
    """Parse and train. Exit codes: 2 bad input, 3 the run diverged, 143 a SIGTERM was answered by saving."""
    if "--help" in sys.argv and os.environ.get("RANK", "0") != "0":
        return
    from data_prep.errors import exit_on_bad_input

    with exit_on_bad_input():
        from megatron.crystalcoder import platform

        # First of all: it answers megatron-core's questions about CUDA, which importing it already asks.
        from megatron.crystalcoder.training import flags

        config = flags.parse(sys.argv[1:])
        platform.initialize()
        from megatron.crystalcoder.checkpoint.random_init import RandomWeights
        from megatron.crystalcoder.model.initialization import InitSettings
        from megatron.crystalcoder.training.exit_codes import EXIT_DIVERGED, EXIT_INTERRUPTED
        from megatron.crystalcoder.training.loop import train
        from megatron.crystalcoder.training.step_reader import NonFiniteError

        new_weights = RandomWeights(config.model, InitSettings.for_hf(config.model), config.seed)
        try:
            result = train(config, initial_weights=new_weights)
        except NonFiniteError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_DIVERGED) from None
        platform.shutdown()
        if result.interrupted:
            raise SystemExit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
