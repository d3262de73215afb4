"""`make bench [BENCH=name]`: run the benchmarks and write their tables to docs/benchmarks.md.

`data` stands for all whose names begin with `data_`.
"""

from __future__ import annotations

import sys
from importlib import import_module

from data_prep.errors import EXIT_BAD_INPUT, exit_on_bad_input

BENCHES = (
    *("data_tokenize", "data_parquet", "data_fim", "data_shuffle", "finetune", "reading", "convert"),
    *("train", "plan"),
)


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all."""
    chosen = []
    for name in names:
        found = [bench for bench in BENCHES if bench == name or bench.startswith(name + "_")]
        chosen += found
        if not found:
            print(f"error: unknown benchmark '{name}': use one of {', '.join(BENCHES)}", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT)
    for name in chosen or BENCHES:
        table = import_module(f"tools.bench.{name}").measure()
        print(table.markdown(), flush=True)
        table.write()


if __name__ == "__main__":
    with exit_on_bad_input():
        main(sys.argv[1:])
