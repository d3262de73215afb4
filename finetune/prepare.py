"""From files of examples to a folder of masked rows.

    out/data-00000.h5 ...      rows to train on, shuffled        out/valid/data-00000.h5    held-out conversations
    out/prepare.json           settings, counts, statistics      out/rejects.jsonl          records left out, and why
    out/chat_format.yaml       the chat template

The folder is made aside and gets its name when it is whole. Tokens lie on disk meanwhile, so memory holds some
hundred bytes per example, whatever its length.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.errors import InputError, full_disk
from data_prep.sources import Fault, FaultPolicy, discover
from data_prep.tokenizer import Tokenizer
from finetune.chat_format import BATCH, ChatFormat, Encoded, encode
from finetune.conversation import DEFAULT_SYSTEM_PROMPT, Conversation, Example, PlainText
from finetune.fitting import LongPolicy, fit
from finetune.formats import ReadyRow
from finetune.recipe import SourceSettings, epochs_of
from finetune.side import Origin, Packing, Side, write_side
from finetune.sources import read_examples
from finetune.templates import TEMPLATE_FILE

PREPARE_FILE, REJECTS_FILE, VALID = "prepare.json", "rejects.jsonl", "valid"
# Sources of a folder that are no examples: what this command leaves there.
_OWN = (PREPARE_FILE, REJECTS_FILE)


@dataclass(frozen=True)
class PrepareOptions:
    """How examples become rows.

    packing: concatenate (the reference's rows) or best-fit (no conversation is cut). long: see `fitting.fit`; None is
    cut for concatenate and truncate for best-fit. valid: share of the conversations to hold out. dedup: leave out
    examples whose ids have been seen. on_error: stop at the first bad record, or skip and list it.
    """

    max_seq_length: int = 2048
    packing: Packing = "concatenate"
    chat_format: ChatFormat = field(default_factory=ChatFormat)
    system: str = DEFAULT_SYSTEM_PROMPT
    long: LongPolicy | None = None
    valid: float = 0.0
    dedup: bool = True
    seed: int = 1
    on_error: Literal["stop", "skip"] = "stop"

    @property
    def long_policy(self) -> LongPolicy:
        """`long`, with its default filled in."""
        return self.long or ("cut" if self.packing == "concatenate" else "truncate")


def prepare(
    sources: Sequence[SourceSettings], out: Path, tokenizer: Tokenizer, options: PrepareOptions
) -> dict[str, Any]:
    """Write the folder `out` and return what `prepare.json` holds.

    Raises:
        InputError: a bad record (unless skipped), a file that cannot be read, settings that contradict each other, or
            data without any token to train on. Nothing is left behind then.
    """
    if options.packing == "best-fit" and options.long_policy == "cut":
        raise InputError("--packing best-fit cuts no conversation: choose --long truncate, split or drop")
    faults = FaultPolicy(options.on_error)
    with _folder(out) as partial:
        files: list[str] = []
        sides = [Side.at(partial / f".{name}") for name in ("train", VALID)]
        statistics = [
            _read_source(number, source, files, sides, tokenizer, options, faults)
            for number, source in enumerate(sources)
        ]
        epochs = epochs_of(sources, [each["tokens"] for each in statistics])
        for each, times in zip(statistics, epochs, strict=True):
            each["epochs"] = round(times, 4)
        rng = np.random.default_rng(options.seed)
        report: dict[str, Any] = {"sources": statistics}
        written = {}
        for name, side, folder in zip(("train", VALID), sides, (partial, partial / VALID), strict=True):
            passes = epochs if name == "train" else [1.0] * len(epochs)
            written[name] = write_side(
                side, folder, passes, files, rng,
                packing=options.packing, seq_length=options.max_seq_length, pad_id=tokenizer.eos_id,
            )  # fmt: skip
            side.close()
        for file in partial.glob(".*"):
            file.unlink()
        if not written["train"]["trained_tokens"]:
            if written[VALID]["trained_tokens"]:
                raise InputError(
                    f"--valid {options.valid:g} holds out every conversation: give more data, or a smaller share"
                )
            named = ", ".join(str(source.path) for source in sources)
            raise InputError(
                f"{named}: no assistant token to train on in the whole data ({_found(statistics)}): are these the "
                "right files, and the answers' weights not all 0?"
            )
        if not written[VALID]["rows"]:
            shutil.rmtree(partial / VALID, ignore_errors=True)
            del written[VALID]
        report |= written
        report["rejected"] = len(faults.faults)
        report["settings"] = _settings(tokenizer, options)
        (partial / PREPARE_FILE).write_text(json.dumps(report, indent=2) + "\n")
        (partial / TEMPLATE_FILE).write_text(options.chat_format.template.to_yaml())
        if faults.faults:
            _write_rejects(partial / REJECTS_FILE, faults.faults)
    return report


def _found(statistics: Sequence[dict[str, Any]]) -> str:
    """What was read and what became of it, in a few words."""
    total = Counter[str]()
    for each in statistics:
        total.update({key: value for key, value in each.items() if key not in ("path", "epochs")})
    return ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in total.items() if count) or "no records"


def _settings(tokenizer: Tokenizer, options: PrepareOptions) -> dict[str, Any]:
    return {
        "max_seq_length": options.max_seq_length,
        "packing": options.packing,
        "template": options.chat_format.template.name,
        "train": options.chat_format.train,
        "turn_ends": options.chat_format.turn_ends,
        "long": options.long_policy,
        "valid": options.valid,
        "dedup": options.dedup,
        "seed": options.seed,
        "system": options.system,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
    }


def _write_rejects(path: Path, faults: Sequence[Fault]) -> None:
    lines = (json.dumps({"file": f.path, "place": f.place, "reason": f.reason}) + "\n" for f in faults)
    path.write_text("".join(lines))


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and vanishes when not."""
    if out.is_file():
        raise InputError(f"{out}: is a file: choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}): choose another --out") from None
    try:
        yield partial
        if out.exists():
            if any(out.iterdir()) and not (out / PREPARE_FILE).is_file():
                raise InputError(f"{out}: holds other files than prepared rows: choose another --out")
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:  # of what is written here: readers tell their own
        reason = full_disk(error) or error.strerror or type(error).__name__
        raise InputError(f"{out}: cannot be written ({reason}): free some space, or choose another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_source(
    number: int,
    source: SourceSettings,
    files: list[str],
    sides: Sequence[Side],
    tokenizer: Tokenizer,
    options: PrepareOptions,
    faults: FaultPolicy,
) -> dict[str, Any]:
    """Encode one source's examples into the stores; what was found."""
    counts: Counter[str] = Counter()
    seen: set[bytes] = set()
    system = options.system if source.system is None else source.system
    rejected = len(faults.faults)

    def encode_one(example: Example) -> Encoded:
        return next(encode((example,), tokenizer, options.chat_format))

    for file in discover([source.path]):
        if Path(file.path).name in _OWN:
            continue
        files.append(file.path)
        examples = read_examples(Path(file.path), faults, source.text)
        while batch := list(islice(examples, BATCH)):
            kept: list[tuple[int, Example]] = []
            for record, example in batch:
                if isinstance(example, ReadyRow):
                    counts["ready_rows"] += 1
                    counts["tokens"] += example.planes.shape[1]
                    origin, place = (number, len(files) - 1, record), f"{file.path}, record {record + 1}"
                    _keep_ready(example, sides[0], origin, place, options, faults, tokenizer)
                elif isinstance(example, Conversation):
                    counts["conversations"] += 1
                    counts["empty_answers"] += any(t.role == "assistant" and not t.text for t in example.turns)
                    opened = example.with_system(system)
                    counts["turns"] += len(opened.turns)
                    kept.append((record, opened))
                else:
                    counts["texts"] += 1
                    kept.append((record, example))
            documents = encode([example for _, example in kept], tokenizer, options.chat_format)
            for (record, example), whole in zip(kept, documents, strict=True):
                side = sides[_share(example, options.seed) < options.valid]
                for document in fit(example, whole, encode_one, options.max_seq_length, options.long_policy, counts):
                    digest = blake2b(document.ids.tobytes(), digest_size=16).digest()
                    if options.dedup and digest in seen:
                        counts["duplicates"] += 1
                        continue
                    seen.add(digest)
                    side.store.append(document)
                    side.origin.append((number, len(files) - 1, record))
                    counts["tokens"] += len(document.ids)
    found = {key: counts[key] for key in ("conversations", "turns", "texts", "ready_rows", "tokens")}
    optional = ("empty_answers", "duplicates", "truncated", "split", "dropped", "dropped_exchanges")
    found |= {key: counts[key] for key in optional if counts[key]}
    if len(faults.faults) > rejected:
        found["rejected"] = len(faults.faults) - rejected
    return {"path": str(source.path), **found}


def _share(example: Example, seed: int) -> float:
    """A number from 0 to 1 by what is said: equal conversations get the same one, whatever their system prompt, place
    and template, and so do all pieces of a long one. That keeps what is held out apart from what is trained."""
    said = [example.text] if isinstance(example, PlainText) else [t.text for t in example.turns if t.role != "system"]
    return int.from_bytes(blake2b("\0".join(said).encode(), digest_size=8, key=str(seed).encode()).digest()) / 2**64


def _keep_ready(
    row: ReadyRow,
    side: Side,
    origin: Origin,
    place: str,
    options: PrepareOptions,
    faults: FaultPolicy,
    tokenizer: Tokenizer,
) -> None:
    """A processed row goes through as it is, if its length, its ids and its labels fit."""
    tokens, mask, labels = row.planes
    path, _, record = place.rpartition(", ")
    if len(tokens) != options.max_seq_length:
        sizes = f"a processed row of {len(tokens)} tokens among rows of {options.max_seq_length}"
        reason = f"{sizes}: prepare such rows with --max-seq-length {len(tokens)}"
    elif not np.array_equal(tokens[1:], labels[:-1]):
        reason = "a processed row whose labels are not the tokens that follow: process it again"
    elif max(tokens.max(), labels[-1]) >= max(tokenizer.vocab_size, 1):
        reason = f"a processed row with ids outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
    else:
        ids = np.append(tokens, labels[-1])
        side.ready.append(Encoded(ids.astype(np.int32), np.append([False], mask).astype(np.bool_)))
        side.ready_origin.append(origin)
        return
    faults(Fault(path, record, reason))
