"""The reference's FIM on packed sequences, quirks included: the same arrays from the same seeds.

For those who must compare with data made by the reference. What it does that the default does not: every text is
decoded and its parts are encoded again with a space in front of each; what a sequence cannot hold is cut off its end,
which is the middle that was to be learned; the last label is EOS whatever follows; the loss mask stays as it was; a
doubled or leading EOS vanishes; one random stream serves all sequences and epochs of a file, and in stage 2 all files
of a group start it anew.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data_prep.errors import InputError
from data_prep.fim import FimSettings
from data_prep.manifest import Record, record
from data_prep.sequences import SequenceFile, SequenceWriter
from data_prep.tokenizer import CODE_TOKENS


class ReferenceFimTask(NamedTuple):
    """One file in all its epochs."""

    source: str
    targets: tuple[str, ...]  # one per epoch
    out: str
    tokenizer: str
    settings: FimSettings
    seed: int


def fim_file_like_reference(task: ReferenceFimTask) -> Record:
    """Do one file in all epochs: what the engine's processes run."""
    backend = _backend(task.tokenizer)
    generator = np.random.RandomState(task.seed)
    with SequenceFile(task.source) as source, ExitStack() as stack:
        writers = [stack.enter_context(SequenceWriter(target, source.max_seq_length)) for target in task.targets]
        for row in source.rows():
            for writer in writers:
                writer.write(_transform(row, backend, generator, task.settings)[None])
    outputs = {w.path.relative_to(task.out).as_posix(): w.summary for w in writers}
    return record(inputs=[task.source], outputs=outputs, counts={"sequences": sum(w.num_rows for w in writers)})


def _transform(row: np.ndarray, backend: Any, generator: Any, settings: FimSettings) -> np.ndarray:
    eos, pad, length = backend.token_to_id("</s>"), backend.token_to_id("<fim_pad>"), row.shape[1]
    *ended, last = np.split(row[0], np.flatnonzero(row[0] == eos) + 1)
    stream: list[int] = []
    for text in ended:
        if len(text) > 1:  # an EOS that ends nothing is dropped
            stream += [*_permute(text[:-1], backend, generator, settings), eos]
    stream += _permute(last, backend, generator, settings)
    result = np.full((3, length), pad, np.int32)
    count = min(len(stream), length)
    result[0, :count] = stream[:count]
    result[2, :count] = [*stream[1:], eos][:count]
    result[1] = row[1]
    result[1, count:] = 0
    return result


def _permute(ids: np.ndarray, backend: Any, generator: Any, settings: FimSettings) -> list[int]:
    if not generator.binomial(1, settings.rate):
        return ids.tolist()
    text = backend.decode(ids.tolist(), skip_special_tokens=False)
    a, b = sorted(generator.randint(low=0, high=len(text) + 1, size=2))
    prefix, middle, suffix = (
        backend.encode(part, add_special_tokens=False).ids for part in (text[:a], text[a:b], text[b:])
    )
    pre, mid, suf = map(backend.token_to_id, ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"))
    if generator.binomial(1, settings.spm_rate):
        return [pre, suf, *suffix, mid, *prefix, *middle]
    return [pre, *prefix, suf, *suffix, mid, *middle]


@lru_cache(maxsize=1)
def _backend(path: str) -> Any:
    """LLaMA's tokenizer.json as it is, with the 18 code tokens behind its vocabulary."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions
        raise InputError(f"{path}: is not a tokenizer.json ({error})") from None
    backend.add_special_tokens([f"<{name}>" for name in CODE_TOKENS])
    return backend
