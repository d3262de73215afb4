"""The `crystalcoder` command: a table of subcommands, each loaded only when it is called, so that --help is instant."""

from __future__ import annotations

import sys
from importlib import import_module

from data_prep.errors import EXIT_BAD_INPUT, exit_on_bad_input

# subcommand -> (module with a `main(arguments: list[str])`, what it does)
COMMANDS = {
    "quickstart": ("tools.quickstart", "the whole chain on this machine: text -> tokens -> pretrain -> tune -> chat"),
    "data": (
        "data_prep.commands",
        "prepare data: download, tokenize, fim, shuffle, build (a whole recipe), verify",
    ),
    "pretrain": ("tools.pretrain", "pretrain from a params.yaml"),
    "plan": ("tools.plan", "what a params.yaml takes of a cluster: memory, layouts, days, cost"),
    "coord-check": ("tools.coord_check", "muP: do activations keep their size as the model gets wider?"),
    "mutransfer": ("tools.mutransfer", "muP: does the best learning rate stay put as the model gets wider?"),
    "finetune": ("tools.finetune", "instruction tuning: prepare data, show its mask, run, export"),
    "convert": ("tools.convert", "checkpoints: Hugging Face <-> Megatron, any TP and PP"),
    "generate": ("tools.generate", "complete or infill code with a Hugging Face checkpoint"),
    "chat": ("tools.chat", "talk to a Hugging Face checkpoint"),
    "serve": ("tools.serve", "a Hugging Face checkpoint behind OpenAI's HTTP interface"),
}

USAGE = "usage: crystalcoder COMMAND [arguments]     (crystalcoder COMMAND --help tells each one's arguments)"


def main(arguments: list[str] | None = None) -> None:
    """Dispatch to the subcommand named by the first argument."""
    with exit_on_bad_input():
        _dispatch(sys.argv[1:] if arguments is None else arguments)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, "\n\ncommands:")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:<12}{summary}")
        return
    if arguments[0] not in COMMANDS:
        print(f"error: unknown command '{arguments[0]}': use one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
    import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


if __name__ == "__main__":
    main()
