"""What the reference's tokenise-and-pack (modelzoo 2.0.2, `LMData`) makes of some files, by the shortest way to say it.

Written from the description of its output alone, with lists, `tokenizers`, `ftfy` and nothing of data_prep: the measure
that `--reference-compat` is held against on random inputs and options.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ftfy
import zstandard
from tokenizers import Tokenizer

Row = tuple[list[int], list[int], list[int]]
SUFFIXES = (".jsonl", ".json.gz", ".jsonl.zst", ".jsonl.zst.tar", ".txt")
# What is in force where nobody says otherwise, and of it what data_params.json names all the same.
DEFAULTS: dict[str, Any] = {
    "max_seq_length": 2048, "files_per_record": 50_000, "seed": 0, "processes": 1, "inverted_mask": False,
    "jsonl_key": "text", "split_text_to_tokenize": False, "chunk_len_to_split": 2000, "remove_bos_in_chunks": False,
    "write_remainder": True, "use_ftfy": True, "ftfy_normalizer": "NFC", "wikitext_detokenize": False,
    "pack_sequences": True, "min_sequence_len": 6, "short_seq_prob": 0.0, "output_name": "examples", "pad_id": None,
    "write_in_batch": True, "resume_from_checkpoint": False, "display_pbar": False,
}  # fmt: skip
NAMED = {
    "setup": {"dataset_processor": "LMDataPreprocessor"},
    "processing": ("eos_id", "pad_id", "split_text_to_tokenize", "chunk_len_to_split", "remove_bos_in_chunks",
                   "write_in_batch", "write_remainder", "resume_from_checkpoint", "display_pbar", "short_seq_prob",
                   "output_name"),
    "dataset": ("use_ftfy", "ftfy_normalizer", "wikitext_detokenize", "pack_sequences", "min_sequence_len"),
}  # fmt: skip
FROM_FLAGS_ONLY = ("min_sequence_len", "short_seq_prob", "output_name")  # what the file says of them is overruled


class Output:
    """`rows`: file name -> list of (ids, mask, labels); `checkpoints`: file name -> text; `parameters`: the JSON."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Row]] = {}
        self.checkpoints: dict[str, str] = {}
        self.parameters: dict[str, dict[str, Any]] = {}


def lmdata(config: dict[str, dict[str, Any]], flags: dict[str, Any]) -> Output:
    """Of a configuration file's content and the flags beside it."""
    given = {n: v for section in config.values() for n, v in section.items() if n not in FROM_FLAGS_ONLY} | flags
    options = DEFAULTS | {n: v for n, v in given.items() if v is not None or n == "ftfy_normalizer"}
    pad_id = options["eos_id"] if options["pad_id"] is None else options["pad_id"]
    tokenizer = Tokenizer.from_file(options["encoder_file"])
    output, totals = Output(), Counter[str]()
    files = find(options)
    share = math.ceil(len(files) / options["processes"])
    for rank in range(math.ceil(len(files) / share)):
        texts = [text for path in files[rank * share :][:share] for text in read(path, options["jsonl_key"])]
        for number, (rows, seen) in enumerate(pack(texts, tokenizer, options | {"pad_id": pad_id}, rank, totals)):
            output.rows[f"{options['output_name']}_{number}_{rank}.h5"] = rows
            output.checkpoints[f"checkpoint_{rank}.txt"] = f"{seen}, {number + 1}"
    written = [row for rows in output.rows.values() for row in rows]
    added = {tokenizer.token_to_id(t.content) for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    texts = [tokenizer.decode([token for token in ids if token not in added]) for ids, _, _ in written]
    output.parameters = parameters(given, options) | {
        "post-process": {
            "discarded_files": totals["discarded"], "processed_files": totals["documents"],
            "successful_files": totals["documents"] - totals["discarded"],
            "n_examples": len(written), "raw_chars_count": totals["characters"], "raw_bytes_count": totals["bytes"],
            "eos_id": options["eos_id"], "pad_id": pad_id, "vocab_size": tokenizer.get_vocab_size(),
        },
        "h5_dataset_stats": {
            "num_sequences": len(written), "num_tokens": len(written) * options["max_seq_length"],
            "non_pad_tokens": sum(token not in (options["eos_id"], pad_id) for ids, _, _ in written for token in ids),
            "loss_valid_tokens": sum(sum(mask) for _, mask, _ in written),
            "detokenized_chars": sum(map(len, texts)), "detokenized_bytes": sum(len(t.encode()) for t in texts),
        },
    }  # fmt: skip
    return output


def pack(
    texts: list[str], tokenizer: Tokenizer, options: dict[str, Any], rank: int, totals: Counter[str]
) -> Iterator[tuple[list[Row], int]]:
    """The files of one process, each with the number of documents that were seen by then."""
    chance = random.Random(options["seed"] + rank)
    length = options["max_seq_length"]
    rest: list[int] = []
    waiting: list[Row] = []
    for number, text in enumerate(texts, start=1):
        totals.update(documents=1, characters=len(text), bytes=len(text.encode()))
        tokens = rest + encode(text, tokenizer, options) + [options["eos_id"]]
        chunks = [tokens[i : i + length + 1] for i in range(0, len(tokens), length)]
        if options["pack_sequences"]:
            rest = chunks.pop()
        elif len(chunks[-1]) == 1:
            totals["discarded"] += 1
            chunks.pop()
        for chunk in chunks:
            if len(chunk) < options["min_sequence_len"]:
                totals["discarded"] += 1
                continue
            if chance.random() < options["short_seq_prob"]:
                chunk = chunk[: chance.randint(2, length - 1)]
            padding = [options["pad_id"]] * (length + 1 - len(chunk))
            ones = [1] * (len(chunk) - 1) + [0] * len(padding)
            mask = [1 - bit for bit in ones] if options["inverted_mask"] else ones
            waiting.append((chunk[:-1] + padding, mask, chunk[1:] + padding))
            if len(waiting) == options["files_per_record"]:
                yield waiting, number
                waiting = []
    if waiting and options["write_remainder"]:
        yield waiting, len(texts)


def parameters(given: dict[str, Any], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options that data_params.json names: those that someone gave, and those that are always there."""
    setup = ("input_dir", "metadata_files", "output_dir", "processes", "module")
    dataset = (*NAMED["dataset"], "jsonl_key", "inverted_mask", "sep_token")
    sections: dict[str, dict[str, Any]] = {
        "setup": dict(NAMED["setup"]),
        "processing": {name: options.get(name) for name in NAMED["processing"]},
        "dataset": {name: options[name] for name in NAMED["dataset"]},
    }
    for name, value in given.items():
        section = "setup" if name in setup else "dataset" if name in dataset else "processing"
        sections[section][name] = value
    return sections


def find(options: dict[str, Any]) -> list[str]:
    """The files in their order; below a folder by name, where the reference takes the disk's order."""
    if options.get("metadata_files"):
        listed = [line for name in options["metadata_files"].split(",") for line in Path(name).read_text().split("\n")]
        return [line.strip() for line in listed if line.strip()]
    return [str(path) for suffix in SUFFIXES for path in sorted(Path(options["input_dir"]).rglob("*" + suffix))]


def read(path: str, key: str) -> list[str]:
    """A file's documents."""
    content = Path(path).read_bytes()
    if path.endswith(".txt"):
        return [io.TextIOWrapper(io.BytesIO(content), "utf-8").read()]
    if path.endswith(".tar"):
        with tarfile.open(path) as archive:
            members = [archive.extractfile(member) for member in archive]
            content = b"".join(zstandard.decompress(member.read()) for member in members if member)
    elif path.endswith(".zst"):
        content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
    elif path.endswith(".gz"):
        content = gzip.decompress(content)
    texts = []
    for line in content.decode("utf-8-sig").split("\n")[:-1]:
        value = json.loads(line)
        value = value[key] if isinstance(value, dict) else value
        texts.append("\n\n".join(value) if isinstance(value, list) else value)
    return texts


def encode(text: str, tokenizer: Tokenizer, options: dict[str, Any]) -> list[int]:
    """A document's ids, without its EOS."""
    if options["use_ftfy"]:
        text = ftfy.fix_text(text, normalization=options["ftfy_normalizer"])
    if options["wikitext_detokenize"]:
        text = detokenize(text)
    if not options["split_text_to_tokenize"]:
        return list(tokenizer.encode(text).ids)
    pieces, start = [], 0
    while start < len(text):
        end = text.find(" ", start + options["chunk_len_to_split"])
        end = len(text) if end < 0 else end
        pieces.append(list(tokenizer.encode(text[start:end]).ids))
        start = end
    if options["remove_bos_in_chunks"]:
        return pieces[0][:1] + [token for piece in pieces for token in piece[1:]]
    return [token for piece in pieces for token in piece]


def detokenize(text: str) -> str:
    """The few rules that the random texts of the tests meet."""
    for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" , ", ", "), (" . ", ". "), (" \n", "\n"), ("\n ", "\n")):
        text = text.replace(old, new)
    return text
