"""The reference's tokenise-and-pack, quirks included: the same arrays, file names, attributes and data_params.json.

For those who must continue or compare with data made by the reference (modelzoo 2.0.2, `LMData`). What it does that the
default does not: the output depends on the number of processes; texts are split at spaces every 2,000 characters, which
puts one space too many at each seam; names of control tokens in a text become control tokens; the last, unfilled window
of each process is lost; an option's command-line default beats the configuration file.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.cleaning import Cleaning
from data_prep.engine import Task, run_step, tell_full_disk
from data_prep.errors import InputError
from data_prep.manifest import Record, input_identity, record, write_whole
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files
from data_prep.sources import REFERENCE_SUFFIXES, Document, Fault, FaultPolicy, read_documents
from data_prep.streams import files_below, open_bytes
from data_prep.tokenizer import BYTE_PIECE

BATCH = 256  # rows that are written at a time


@dataclass(frozen=True)
class ReferenceOptions:
    """The effective options, under the reference's names; see its `data_params.json`."""

    encoder_file: str
    max_seq_length: int
    eos_id: int
    pad_id: int
    cleaning: Cleaning
    short_seq_prob: float = 0.0
    files_per_record: int = 50_000
    write_remainder: bool = True
    output_name: str = "examples"
    seed: int = 0
    min_sequence_len: int = 6
    pack_sequences: bool = True
    split_text_to_tokenize: bool = False
    chunk_len_to_split: int = 2000
    remove_bos_in_chunks: bool = False
    jsonl_key: str | None = None
    inverted_mask: bool = False
    on_error: Literal["stop", "skip"] = "stop"


class RankTask(NamedTuple):
    """One process's share: its files in order."""

    options: ReferenceOptions
    files: tuple[str, ...]
    rank: int
    out: str


def discover(input_dir: Path) -> list[str]:
    """The input files, one suffix after the other. The reference leaves the rest to the disk; here it is by name."""
    files = files_below(input_dir)
    return [str(path) for suffix in REFERENCE_SUFFIXES for path in files if path.name.endswith(suffix)]


def tokenize_like_reference(
    files: list[str],
    out: Path,
    options: ReferenceOptions,
    *,
    processes: int,
    sections: dict[str, dict[str, Any]],
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise and pack `files` in the given order; writes also data_params.json from `sections` and the counts.

    Raises:
        InputError: bad input, with file and place.
    """
    backend = _backend(options.encoder_file)
    vocab_size = backend.get_vocab_size()
    for name, number in (("eos_id", options.eos_id), ("pad_id", options.pad_id)):
        if not 0 <= number < vocab_size:
            raise InputError(f"--{name} {number}: {options.encoder_file} has the ids 0 to {vocab_size - 1}")
    if (named := backend.token_to_id("</s>")) not in (None, options.eos_id):
        print(f"note: eos_id {options.eos_id}: in {options.encoder_file} </s> is {named}")
    for path in files:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file (is it in --metadata_files?)")
    size = -(-len(files) // max(1, processes))
    groups = [tuple(files[start : start + size]) for start in range(0, len(files), size)]
    tasks = [Task(f"rank_{n}", RankTask(options, group, n, str(out))) for n, group in enumerate(groups)]
    settings = asdict(options) | {"inputs": [input_identity(path) for path in files], "processes": processes}
    manifest = run_step(
        "reference",
        out,
        tasks,
        tokenize_rank,
        settings=settings,
        processes=max(1, processes),
        overwrite=overwrite,
        progress=progress,
    )
    counts = manifest["counts"]
    parameters = sections | {
        "post-process": {
            "discarded_files": counts.get("discarded", 0),
            "eos_id": options.eos_id,
            "n_examples": counts.get("sequences", 0),
            "pad_id": options.pad_id,
            "processed_files": counts.get("documents", 0),
            "raw_bytes_count": counts.get("raw_bytes", 0),
            "raw_chars_count": counts.get("raw_chars", 0),
            "successful_files": counts.get("documents", 0) - counts.get("discarded", 0),
            "vocab_size": vocab_size,
        },
        "h5_dataset_stats": _statistics(out, options),
    }
    with tell_full_disk(out):
        write_whole(out / "data_params.json", json.dumps(parameters, indent=4, sort_keys=True))
    return manifest


def tokenize_rank(task: RankTask) -> Record:
    """Do one process's share: what the engine's processes run."""
    options, rank = task.options, task.rank
    faults = FaultPolicy(options.on_error)
    counts: Counter[str] = Counter()
    outputs: dict[str, dict[str, Any]] = {}
    writer: SequenceWriter | None = None
    pending: list[np.ndarray] = []

    def finish(writer: SequenceWriter) -> None:
        writer.close()
        outputs[writer.path.name] = writer.summary
        counts["sequences"] += writer.num_rows
        Path(task.out, f"checkpoint_{rank}.txt").write_text(f"{counts['documents']}, {len(outputs)}")

    try:
        for row in _rows(task, faults, counts):
            if writer is None:
                path = Path(task.out, f"{options.output_name}_{len(outputs)}_{rank}.h5")
                writer = SequenceWriter(path, options.max_seq_length)
            pending.append(row)
            is_full = writer.num_rows + len(pending) == options.files_per_record
            if is_full or len(pending) == BATCH:
                writer.write(np.stack(pending))
                pending = []
            if is_full:
                finish(writer)
                writer = None
        if writer and options.write_remainder:
            if pending:
                writer.write(np.stack(pending))
            finish(writer)
            writer = None
    finally:
        if writer:
            writer.discard()
    return record(inputs=task.files, outputs=outputs, counts=dict(counts), faults=faults.faults)


def _documents(path: str, faults: FaultPolicy, key: str | None) -> Iterator[Document]:
    """`read_documents`, but in a text file line ends become LF and a byte-order mark stays."""
    if not path.endswith(".txt"):
        yield from read_documents(path, faults, key)
        return
    with open_bytes(path) as stream:
        try:
            yield Document(0, stream.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
        except UnicodeDecodeError as error:
            faults(Fault(path, f"byte {error.start}", "is not UTF-8"))


def _rows(task: RankTask, faults: FaultPolicy, counts: Counter[str]) -> Iterator[np.ndarray]:
    options, length = task.options, task.options.max_seq_length
    generator = random.Random(options.seed + task.rank)
    carried: list[int] = []
    for path in task.files:
        for document in _documents(path, faults, options.jsonl_key):
            text = options.cleaning(document.text)
            if not text and options.split_text_to_tokenize and options.remove_bos_in_chunks:
                faults(Fault(path, str(document.number + 1), "the text is empty, which stops the reference"))
                continue
            counts["documents"] += 1
            counts["raw_chars"] += len(document.text)
            counts["raw_bytes"] += len(document.text.encode())
            tokens = carried + _encode(text, options)
            chunks = [tokens[start : start + length + 1] for start in range(0, len(tokens), length)]
            if options.pack_sequences:
                carried = chunks.pop()  # never full: it starts at most `length` tokens before the end
            elif len(chunks[-1]) < 2:
                chunks.pop()
                counts["discarded"] += 1
            for chunk in chunks:
                if len(chunk) < options.min_sequence_len:
                    counts["discarded"] += 1
                    continue
                if generator.random() < options.short_seq_prob:
                    chunk = chunk[: generator.randint(2, length - 1)]
                yield _row(chunk, options)


def _encode(text: str, options: ReferenceOptions) -> list[int]:
    """A document's ids: pieces of at least `chunk_len_to_split` characters that end before a space, then EOS."""
    backend = _backend(options.encoder_file)
    if not options.split_text_to_tokenize:
        return [*backend.encode(text).ids, options.eos_id]
    if not text:
        return [options.eos_id]
    pieces, start = [], 0
    while (space := text.find(" ", start + options.chunk_len_to_split)) >= 0:
        pieces.append(backend.encode(text[start:space]).ids)
        start = space
    pieces.append(backend.encode(text[start:]).ids)
    if options.remove_bos_in_chunks:
        pieces = [pieces[0][:1], *(piece[1:] for piece in pieces)]
    return [*(token for piece in pieces for token in piece), options.eos_id]


def _row(chunk: list[int], options: ReferenceOptions) -> np.ndarray:
    row = np.full((3, options.max_seq_length), options.pad_id, np.int32)
    count = len(chunk) - 1
    row[0, :count], row[2, :count] = chunk[:-1], chunk[1:]
    row[1] = np.arange(options.max_seq_length) < count
    if options.inverted_mask:
        row[1] = 1 - row[1]
    return row


def _backend(path: str) -> Any:
    """The tokenizer as it is, control tokens in its matcher."""
    return _load(str(Path(path).resolve()))


@lru_cache(maxsize=1)
def _load(path: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions
        raise InputError(f"{path}: is not a tokenizer.json ({error}): name one with --encoder_file") from None


def _statistics(out: Path, options: ReferenceOptions) -> dict[str, int]:
    """The `h5_dataset_stats` of data_params.json: counts, and the size of the decoded sequences."""
    backend = _backend(options.encoder_file)
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    pieces = [backend.id_to_token(number) or "" for number in range(backend.get_vocab_size())]
    counts = Counter[str]()
    files = sequence_files(out) if any(out.glob("*.h5")) else []
    for path in files:
        for tokens, mask, _ in SequenceFile(path).rows():
            text = _decode(pieces[token] for token in tokens if token not in special).removeprefix(" ")
            counts["num_sequences"] += 1
            counts["num_tokens"] += len(tokens)
            counts["non_pad_tokens"] += int(((tokens != options.eos_id) & (tokens != options.pad_id)).sum())
            counts["loss_valid_tokens"] += int(mask.sum())
            counts["detokenized_chars"] += len(text)
            counts["detokenized_bytes"] += len(text.encode())
    names = ("num_sequences", "num_tokens", "detokenized_bytes", "detokenized_chars", "non_pad_tokens")
    return {name: counts[name] for name in (*names, "loss_valid_tokens")}


def _decode(pieces: Iterable[str]) -> str:
    """As the tokenizers library decodes: a run of byte pieces that is not UTF-8 gives U+FFFD for each byte."""
    parts: list[str] = []
    run = b""

    def end_run() -> None:
        nonlocal run
        try:
            parts.append(run.decode())
        except UnicodeDecodeError:
            parts.append("\ufffd" * len(run))
        run = b""

    for piece in pieces:
        if byte := BYTE_PIECE.match(piece):
            run += bytes([int(byte[1], 16)])
        else:
            end_run()
            parts.append(piece.replace("▁", " "))
    end_run()
    return "".join(parts)
