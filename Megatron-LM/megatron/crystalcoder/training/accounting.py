"""Which data a run has taken and will take, dataset by dataset: arithmetic on its order, and what checkpoints record.

Samples are counted, not stored: those of each dataset among the first n are a function of the order and n. Only where a
run went on with other data (`--new-data-order`) is something carried along: what the orders before had given.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.errors import InputError
from data_prep.subset import format_subset
from megatron.crystalcoder.data.order import Order
from megatron.crystalcoder.data.rows import Rows
from megatron.crystalcoder.training.config import DataSettings, TrainConfig
from megatron.crystalcoder.training.resume import Start


@dataclass(frozen=True)
class Accounting:
    """The data of a run: `order` since sample `since`, and the samples that each dataset gave before that.

    names: of the order's datasets. fingerprint: of rows and order together.
    """

    names: tuple[str, ...]
    order: Order
    fingerprint: str
    since: int = 0
    before: Mapping[str, int] = field(default_factory=dict)

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the run's first `samples` samples (`since` or more) came from each dataset, the largest first."""
        total = Counter(self.before)
        here = zip(self.names, self.order.drawn(samples), self.order.drawn(self.since), strict=True)
        for name, until, already in here:
            total[name] += until - already
        return dict(total.most_common())

    def record(self, samples: int) -> dict[str, Any]:
        """What a checkpoint keeps, `samples` samples into the run."""
        return {
            "data_fingerprint": self.fingerprint,
            "data_since": self.since,
            "data_before": dict(self.before),
            "data_drawn": self.drawn(samples),
        }


def open_account(config: TrainConfig, rows: Rows, order: Order, start: Start) -> Accounting:
    """The account of a run that starts so, continued where a checkpoint has one.

    Raises InputError when a run that goes on would take up its position in other rows than it left, unless
    `config.new_data_order`: then the run's next sample is the one at this position of the new order.
    """
    fingerprint = hashlib.blake2b(f"{rows.fingerprint()} {order!r}".encode(), digest_size=16).hexdigest()
    names = dataset_names(config.data)
    if start.checkpoint is None:
        return Accounting(names, order, fingerprint)
    recorded, done = vars(start.checkpoint.args), start.progress.consumed_samples
    if recorded["data_fingerprint"] == fingerprint:
        return Accounting(names, order, fingerprint, recorded.get("data_since", 0), recorded.get("data_before", {}))
    if not config.new_data_order:
        raise InputError(
            f"{start.checkpoint.path}: this run stopped after {done} samples of other data than is given now (its "
            "files, their order, weights or the seed differ): give the same, go on from there in the new data with "
            "--new-data-order, or begin anew in another directory"
        )
    if recorded["seq_length"] != config.seq_length:
        raise InputError(
            f"{start.checkpoint.path}: this run's sequences have {recorded['seq_length']} tokens, those given now "
            f"{config.seq_length}, so its position is none in them: begin anew in another directory from its weights"
        )
    return Accounting(names, order, fingerprint, done, recorded.get("data_drawn", {"not recorded": done}))


def dataset_names(settings: DataSettings) -> tuple[str, ...]:
    """The datasets of the order that `open_data` makes of `settings`, in its order; two may have one name."""
    if not settings.mixture:
        return (", ".join(map(str, settings.paths)),)
    return tuple(
        str(entry.data_dir) + (f" {format_subset(entry.subset)}" if entry.subset != ((0.0, 1.0),) else "")
        for entry in settings.mixture
        if entry.weight > 0
    )
