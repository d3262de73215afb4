"""`crystalcoder mutransfer`: does the best learning rate stay put over widths? With muP it should, without not."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

from data_prep.errors import InputError, exit_on_bad_input
from megatron.crystalcoder.training.config import PiecewiseSchedule, ScheduleSegment
from tools import width_sweep

# The last share of the steps, whose mean loss is the result of a run.
_JUDGED_SHARE = 0.2


def main(arguments: list[str]) -> None:
    """The `crystalcoder mutransfer` subcommand."""
    top = width_sweep.parser(
        "mutransfer",
        "Train every width at every learning rate, with muP and without: where is the best one?",
        widths="64,128,256",
        steps=60,
        batch_size=8,
    )
    top.add_argument(
        "--lrs", type=width_sweep.numbers(float), help="peak rates; default: the file's times 1/8, 1/4, ... 8"
    )
    options = top.parse_intermixed_args(arguments)
    params, config = width_sweep.read(options)
    if options.lrs and len(options.lrs) < 3:
        raise InputError(f"--lrs: {len(options.lrs)} given where three at least show an optimum")
    if width_sweep.on_ranks("tools.mutransfer", options, arguments):
        return

    import torch.distributed as dist

    from megatron.crystalcoder import platform
    from megatron.crystalcoder.training import widths

    data = widths.prepare(config)
    lrs = options.lrs or [widths.peak_rate(config) * 2.0**k for k in range(-3, 4)]
    losses: dict[str, dict[int, list[float]]] = {}
    for parametrisation in widths.PARAMETRISATIONS:
        for width in options.widths:
            row = losses.setdefault(parametrisation, {}).setdefault(width, [])
            for lr in lrs:
                schedule = short_schedule(lr, options.steps)
                scheduled = replace(config, schedule=schedule, train_iters=options.steps)
                runs = [
                    _final_loss(widths.begin(params, scheduled, width, parametrisation, data, seed=seed))
                    for seed in range(options.seeds)
                ]
                row.append(sum(runs) / len(runs))
                if dist.get_rank() == 0:
                    print(f"{parametrisation:<4} width {width:>5}  lr {lr:.3g}  loss {row[-1]:.4f}", flush=True)
    rank = dist.get_rank()
    platform.shutdown()
    if rank:
        return
    optima = {name: {w: optimum(lrs, row) for w, row in rows.items()} for name, rows in losses.items()}
    print(report(optima))
    width_sweep.write(
        options.out, "mutransfer", {"lrs": lrs, "loss": losses, "optimum": optima}, _figure(lrs, losses, optima)
    )


def short_schedule(lr: float, steps: int) -> PiecewiseSchedule:
    """Linear warm-up over a tenth of the steps, then linear to a tenth of the rate."""
    warmup = max(1, steps // 10)
    return PiecewiseSchedule(
        (
            ScheduleSegment("Linear", 0.0, lr, warmup),
            ScheduleSegment("Linear", lr, lr / 10, max(1, steps - warmup)),
        )
    )


def optimum(lrs: list[float], losses: list[float]) -> float:
    """The rate of least loss: of the parabola through the best grid point and its neighbours, over log lr.

    At the grid's edge, that point. Runs that diverged have loss inf.
    """
    best = min(range(len(lrs)), key=losses.__getitem__)
    if best in (0, len(lrs) - 1) or not all(map(math.isfinite, losses[best - 1 : best + 2])):
        return lrs[best]
    x = [math.log(lr) for lr in lrs[best - 1 : best + 2]]
    y = losses[best - 1 : best + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * bend)) if bend > 0 else lrs[best]


def report(optima: dict[str, dict[int, float]]) -> str:
    """The best rate of each width, and by how many doublings it moved from the narrowest to the widest."""
    lines = [f"{'best learning rate':<22}" + "".join(f"{width:>10}" for width in optima["mup"]) + f"{'moved':>18}"]
    for name, title in (("mup", "muP"), ("sp", "without muP")):
        rates = list(optima[name].values())
        moved = math.log2(rates[-1] / rates[0])
        lines.append(f"{title:<22}" + "".join(f"{rate:>10.4g}" for rate in rates) + f"{moved:>+8.2f} doublings")
    return "\n".join(lines)


def _final_loss(trial: Any) -> float:
    from megatron.crystalcoder.training.schedules import learning_rate
    from megatron.crystalcoder.training.step import train_step

    losses = []
    for step in range(trial.config.train_iters):
        lr = learning_rate(trial.config.schedule, step=step, samples=step * trial.config.global_batch_size)
        result = train_step(trial.model, trial.optimizer, trial.batches, trial.config, lr=lr)
        if not result.updated:
            return math.inf
        losses.append(result.lm_loss)
    judged = losses[-max(1, int(len(losses) * _JUDGED_SHARE)) :]
    return sum(judged) / len(judged)


def _figure(lrs: list[float], losses: dict[str, Any], optima: dict[str, dict[int, float]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (name, title) in zip(panels, (("mup", "muP"), ("sp", "standard parametrisation")), strict=True):
        for number, (width, row) in enumerate(losses[name].items()):
            panel.semilogx(lrs, row, marker="o", color=f"C{number}", label=f"width {width}", base=2)
            panel.axvline(optima[name][width], color=f"C{number}", linestyle=":", linewidth=1)
        panel.set_title(title)
        panel.set_xlabel("peak learning rate")
        panel.set_xticks(lrs, [f"{lr:.2g}" for lr in lrs])
    finite = [loss for rows in losses.values() for row in rows.values() for loss in row if math.isfinite(loss)]
    panels[0].set_ylim(min(finite) - 0.1, min(min(finite) + 3, max(finite)) + 0.1)
    panels[0].set_ylabel("loss, mean of the last fifth")
    panels[0].legend()
    return figure


if __name__ == "__main__":
    with exit_on_bad_input():
        main(sys.argv[1:])
