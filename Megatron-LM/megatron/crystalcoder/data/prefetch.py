"""Micro-batches read and pinned by a thread while the GPU works, so that neither it nor the host waits for them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Empty, Full, Queue

import torch

from megatron.crystalcoder import platform

Batch = dict[str, torch.Tensor]


def prefetched(batches: Iterator[Batch], *, depth: int, pin: bool) -> Generator[Batch, None, None]:
    """The same batches in the same order, at most `depth` of them ahead; pinned ones go to a GPU without a wait.

    What `batches` raises is raised here in its place. The thread ends with the iterator.
    """
    ahead: Queue[Batch | BaseException | None] = Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def read() -> None:
        try:
            if pin:
                torch.cuda.set_device(platform.device())  # a thread begins on GPU 0
            for batch in batches:
                if not put({key: tensor.pin_memory() for key, tensor in batch.items()} if pin else batch):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the one who asks
            put(error)
        finally:
            if isinstance(batches, Generator):
                batches.close()  # and with it processes that read for it, whoever still refers to it

    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ahead.get(timeout=1.0)
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join(timeout=10)
