"""`crystalcoder coord-check`: is the parametrisation muP? Sizes of activations and updates over widths, beside SP's."""

from __future__ import annotations

import sys
from typing import Any

from data_prep.errors import InputError, exit_on_bad_input
from tools import width_sweep

# A slope of log size over log width below this counts as flat.
FLAT = 0.05
# Without a warm-up the first steps need a smaller rate than the schedule's peak.
_PEAK_SHARE = 1 / 20
# Its mean is over the whole vocabulary, whose logits at muP's start are sums of random signs: it falls with the root.
_NOT_JUDGED = ("logits",)


def main(arguments: list[str]) -> None:
    """The `crystalcoder coord-check` subcommand. Exit code 1: muP's activations are not flat."""
    top = width_sweep.parser(
        "coord-check",
        "Train a few steps at several widths, with muP and without; do activations keep their size?",
        widths="128,256,512",
        steps=5,
        batch_size=4,
    )
    top.add_argument("--lr", type=float, help="constant learning rate; default: a twentieth of the file's peak")
    options = top.parse_intermixed_args(arguments)
    if options.lr is not None and not 0 < options.lr < float("inf"):
        raise InputError(f"--lr {options.lr:g}: must be above 0 and finite")
    params, config = width_sweep.read(options)
    if width_sweep.on_ranks("tools.coord_check", options, arguments):
        return

    import torch.distributed as dist

    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training import coordinates, widths

    data = widths.prepare(config)
    lr = options.lr or widths.peak_rate(config) * _PEAK_SHARE
    sizes: dict[str, Any] = {}  # kind -> parametrisation -> module -> width -> size after each step
    for parametrisation in widths.PARAMETRISATIONS:
        for width in options.widths:
            for seed in range(options.seeds):
                measured = coordinates.measure(
                    params, config, parametrisation, width, data, steps=options.steps, lr=lr, seed=seed
                )
                for module, each in measured.items():
                    for kind in ("activation", "update"):
                        of_kind = sizes.setdefault(kind, {}).setdefault(parametrisation, {})
                        of_kind.setdefault(module, {}).setdefault(width, []).append(getattr(each, kind))
    rank = dist.get_rank()
    platform.shutdown()
    if rank:
        return
    means = {
        kind: {
            parametrisation: {
                module: {width: [sum(x) / len(x) for x in zip(*runs, strict=True)] for width, runs in by_width.items()}
                for module, by_width in modules.items()
            }
            for parametrisation, modules in of_kind.items()
        }
        for kind, of_kind in sizes.items()
    }
    slopes = {
        kind: {
            parametrisation: {module: coordinates.slopes(by_width) for module, by_width in modules.items()}
            for parametrisation, modules in of_kind.items()
        }
        for kind, of_kind in means.items()
    }
    print(report(slopes))
    width_sweep.write(options.out, "coord-check", {"lr": lr, "sizes": means, "slopes": slopes}, _figure(means))
    worst = {name: steepest(slopes["activation"][name]) for name in widths.PARAMETRISATIONS}
    flat = worst["mup"] < FLAT
    print(
        f"muP: steepest slope of activations {worst['mup']:.3f}, {'flat' if flat else 'NOT flat'} (below {FLAT}); "
        f"without muP {worst['sp']:.3f}"
    )
    if not flat:
        raise SystemExit(1)


def steepest(slopes: dict[str, list[float]]) -> float:
    """The largest slope, whatever its sign, of any judged module after any step."""
    return max(abs(x) for module, by_step in slopes.items() if module not in _NOT_JUDGED for x in by_step)


def report(slopes: dict[str, Any]) -> str:
    """Each module's steepest slope over the steps, with muP and without."""
    lines = [f"{'slope of log size over log width':<34}{'muP':>8}{'SP':>8}"]
    for kind, of_kind in slopes.items():
        for module in of_kind["mup"]:
            values = (max(of_kind[name][module], key=abs) for name in ("mup", "sp"))
            lines.append(f"{module + ', ' + kind:<34}" + "".join(f"{value:>+8.3f}" for value in values))
    return "\n".join(lines)


def _figure(means: dict[str, Any]) -> Any:
    """One panel per kind and parametrisation: size after the last step over width, a line per module."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    titles = {"mup": "muP", "sp": "standard parametrisation"}
    for row, (kind, of_kind) in zip(panels, means.items(), strict=True):
        for panel, (parametrisation, modules) in zip(row, of_kind.items(), strict=True):
            for module, by_width in modules.items():
                style = "--" if module in _NOT_JUDGED else "-"
                panel.loglog(
                    list(by_width), [steps[-1] for steps in by_width.values()], style, marker="o", label=module
                )
            panel.set_title(f"{kind}s, {titles[parametrisation]}")
            panel.set_xticks(list(by_width), [str(width) for width in by_width], minor=False)
            panel.minorticks_off()
    for panel in panels[-1]:
        panel.set_xlabel("width")
    for row, name in zip(panels, ("mean |activation|", "mean |change since the start|"), strict=True):
        row[0].set_ylabel(name)
    panels[0][0].legend(fontsize="x-small", ncols=2)
    return figure


if __name__ == "__main__":
    with exit_on_bad_input():
        main(sys.argv[1:])
