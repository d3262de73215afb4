"""The step from text to sequences: read documents, tokenise, FIM if asked for, pack, write.

The sorted input files are grouped into shards by size alone, large ones divided (division.py); each shard is packed by
itself into `OUT/examples_<k>_<s>.h5` (k the file number within shard s). A shard is one task of the engine, so the
output is the same for any number of processes, and a relaunch goes on where the last one stopped. The end of each shard
is one padded sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.cleaning import Cleaning
from data_prep.division import divide
from data_prep.engine import Task, check_output_name, run_step
from data_prep.errors import InputError
from data_prep.fim import Draws, FimSettings, fim_document
from data_prep.manifest import Record, input_identity, record
from data_prep.packing import Packer
from data_prep.provenance import Span, SpanTracker
from data_prep.sequences import SequenceWriter
from data_prep.sources import Document, FaultPolicy, Source, discover, read_documents
from data_prep.streams import size_of
from data_prep.tokenizer import Tokenizer, load_tokenizer_once

AUTOMATIC = (1 << 20, 16 << 20)  # bytes of a shard
BATCH = 1 << 20  # characters that are encoded at a time


@dataclass(frozen=True)
class TokenizeOptions:
    """All that decides what the sequences are.

    Attributes:
        max_seq_length: positions of a sequence, L.
        fim: per-document FIM; None for none. Its chance is keyed by (seed, epoch, input file, document).
        epochs: how often the corpus is written, each time with other FIM draws, to OUT/epoch_<e>; 0: once, to OUT.
        rows_per_file: sequences of one HDF5 file at most.
        shard_bytes: input files are grouped into shards of about this size, and much larger ones are divided; None: a
            64th of the corpus, within AUTOMATIC: work for many processes, and not too many files.
        eos_id: what the caller takes the end of a document to be; a tokenizer that differs is refused.
        pad_id: fills the last sequence of a shard, [eos_id].
        min_sequence_len: the end of a shard, if it has fewer tokens, is left out and counted.
        cleaning: changes to the texts, none by default.
    """

    tokenizer: str
    max_seq_length: int
    fim: FimSettings | None = None
    epochs: int = 0
    text_key: str | None = None
    text_suffixes: tuple[str, ...] = ()
    on_error: Literal["stop", "skip"] = "stop"
    rows_per_file: int = 50_000
    shard_bytes: int | None = None
    output_name: str = "examples"
    eos_id: int | None = None
    pad_id: int | None = None
    min_sequence_len: int = 2
    cleaning: Cleaning = field(default_factory=Cleaning)

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise InputError(f"--max-seq-length {self.max_seq_length}: at least 2 is needed")
        if self.rows_per_file < 1:
            raise InputError(f"--rows-per-file {self.rows_per_file}: at least 1 is needed")
        check_output_name("--output-name", self.output_name)


@dataclass(frozen=True)
class Shard:
    """One task: these files, in this order, to these output files."""

    options: TokenizeOptions
    sources: tuple[Source, ...]
    out: str
    folder: str  # "" or "epoch_<e>"
    number: int
    epoch: int


def tokenize_corpus(
    inputs: list[str],
    out: Path,
    options: TokenizeOptions,
    *,
    processes: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise and pack the files of `inputs` into `out`; the manifest.

    Raises:
        InputError: bad input, with file and place (unless `options.on_error` is "skip").
    """
    tokenizer = load_tokenizer_once(options.tokenizer)
    if options.eos_id not in (None, tokenizer.eos_id):
        raise InputError(f"--eos_id {options.eos_id}: in {tokenizer.path} </s> is {tokenizer.eos_id}")
    pad = options.pad_id
    if pad is not None and not 0 <= pad < tokenizer.vocab_size and pad != tokenizer.fim_ids.pad:
        raise InputError(f"--pad_id {pad}: {tokenizer.path} has the ids 0 to {tokenizer.vocab_size - 1}")
    # If the FIM ids are not complete, it stops here and not in a worker.
    vocab_size = tokenizer.vocab_size_with_fim if options.fim else max(tokenizer.vocab_size, 1 + (pad or 0))
    sources = discover(inputs, options.text_suffixes)
    found = replace(options, tokenizer=str(tokenizer.path))
    groups = list(group_by_size(sources, options.shard_bytes))
    shards = [
        Shard(found, group, str(out), f"epoch_{epoch}" if options.epochs else "", number, epoch)
        for epoch in range(max(1, options.epochs))
        for number, group in enumerate(groups)
    ]
    settings = asdict(options) | {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": vocab_size,
        "inputs": [{"name": source.name, **input_identity(source.path)} for source in sources],
    }
    tasks = [Task(f"{shard.folder or 'shard'}_{shard.number}", shard) for shard in shards]
    return run_step(
        "tokenize",
        out,
        tasks,
        tokenize_shard,
        settings=settings,
        processes=processes,
        overwrite=overwrite,
        progress=progress,
    )


def group_by_size(sources: list[Source], shard_bytes: int | None) -> Iterator[tuple[Source, ...]]:
    """Consecutive files, or parts of large ones, in groups that end when they reach `shard_bytes` (None: automatic)."""
    corpus_bytes = sum(size_of(source.path) or 0 for source in sources)
    if shard_bytes is None:
        shard_bytes = min(max(corpus_bytes // 64, AUTOMATIC[0]), AUTOMATIC[1])
    group: list[Source] = []
    size = 0
    for part, part_size in chain.from_iterable(divide(source, shard_bytes, corpus_bytes) for source in sources):
        group.append(part)
        size += part_size
        if size >= shard_bytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def tokenize_shard(shard: Shard) -> Record:
    """Do one shard: what the engine's processes run."""
    options = shard.options
    tokenizer = load_tokenizer_once(options.tokenizer)
    faults = FaultPolicy(options.on_error)
    counts: Counter[str] = Counter()
    packer = Packer(options.max_seq_length, tokenizer.eos_id if options.pad_id is None else options.pad_id)

    tracker = SpanTracker(options.max_seq_length)

    def rows() -> Iterator[tuple[np.ndarray, list[list[Span]]]]:
        for path, number, ids in encoded_documents(shard, tokenizer, faults, counts):
            tracker.add(path, number, len(ids))
            completed = packer.add(ids)
            if len(completed):
                yield completed, tracker.take(len(completed))
        rest = packer.finish()
        if len(rest) and rest[0, 1].sum() + 1 < options.min_sequence_len:
            counts["tokens_dropped"] += int(rest[0, 1].sum())
        else:
            yield rest, tracker.take(len(rest))

    outputs = write_rows(
        rows(),
        lambda k: Path(shard.out, shard.folder, f"{options.output_name}_{k}_{shard.number}.h5"),
        options.max_seq_length,
        options.rows_per_file,
        counts,
    )
    names = {Path(path).relative_to(shard.out).as_posix(): summary for path, summary in outputs.items()}
    return record(inputs=[s.name for s in shard.sources], outputs=names, counts=dict(counts), faults=faults.faults)


def encoded_documents(
    shard: Shard, tokenizer: Tokenizer, faults: FaultPolicy, counts: Counter[str]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """The documents of the shard: file, number there, and BOS, ids, EOS; empty ones are counted and left out."""
    fim = shard.options.fim
    begin, end = np.array([tokenizer.bos_id], np.int32), np.array([tokenizer.eos_id], np.int32)
    for batch in batches(documents(shard, faults, counts)):
        if fim:
            encoded = []
            for source, document in batch:
                draws = Draws.of(fim.seed, shard.epoch, source.name, document.number)
                encoded.append(fim_document(document.text, tokenizer, fim, draws))
                counts["documents_fim"] += draws.whether < fim.rate
        else:
            encoded = tokenizer.encode_all([" " + document.text for _, document in batch])
        for (source, document), ids in zip(batch, encoded, strict=True):
            counts["documents"] += 1
            counts["characters"] += len(document.text)
            counts["tokens"] += len(ids) + 2
            yield source.path, document.number, np.concatenate([begin, ids, end])


def documents(shard: Shard, faults: FaultPolicy, counts: Counter[str]) -> Iterator[tuple[Source, Document]]:
    """The shard's documents that hold text, cleaned."""
    cleaning = shard.options.cleaning
    for source in shard.sources:
        for document in read_documents(source.path, faults, shard.options.text_key, source.part):
            counts["documents_read"] += 1
            text = cleaning(document.text)
            counts["documents_cleaned"] += text != document.text
            if text:
                yield source, Document(document.number, text)
            else:
                counts["documents_empty"] += 1


def batches(documents: Iterator[tuple[Source, Document]]) -> Iterator[list[tuple[Source, Document]]]:
    """Consecutive documents, about BATCH characters together: many at a time are encoded faster than one by one."""
    batch: list[tuple[Source, Document]] = []
    size = 0
    for source, document in documents:
        batch.append((source, document))
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_rows(
    batches: Iterator[tuple[np.ndarray, list[list[Span]]]],
    path_of: Any,
    max_seq_length: int,
    rows_per_file: int,
    counts: Counter[str],
) -> dict[str, dict[str, Any]]:
    """Write rows to `path_of(0)`, `path_of(1)`, … of at most `rows_per_file` each; path -> what the manifest records.

    A file takes its name when it is complete. Without any row there is no file.
    """
    outputs: dict[str, dict[str, Any]] = {}
    writer: SequenceWriter | None = None

    def finish(done: SequenceWriter) -> None:
        done.close()
        outputs[str(done.path)] = done.summary

    try:
        for batch, spans in batches:
            counts["sequences"] += len(batch)
            counts["padding"] += int((batch[:, 1] == 0).sum())
            while len(batch):
                if writer is None:
                    writer = SequenceWriter(path_of(len(outputs)), max_seq_length)
                room = rows_per_file - writer.num_rows
                writer.write(batch[:room], spans[:room])
                batch, spans = batch[room:], spans[room:]
                if writer.num_rows == rows_per_file:
                    finish(writer)
                    writer = None
        if writer:
            finish(writer)
            writer = None
    finally:
        if writer:
            writer.discard()
    return outputs
