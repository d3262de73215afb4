"""Cut a large file into parts that processes can share: JSON lines between lines, parquet between row groups.

The cuts depend on the file and the wished size alone, and a document keeps its number in the whole file, so neither
provenance nor the chance of FIM knows of them. What is compressed as a whole (.gz, .zst), a JSON array and a text file
stay in one piece, and so does what lies behind a URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from data_prep.errors import InputError
from data_prep.sources import Part, Source
from data_prep.streams import is_url, open_bytes, size_of

# Smaller files are not worth it, for JSON lines have to be read once to count them: those of fewer parts than this,
# unless they are more than a 16th of a corpus, which would leave some processes without work.
WORTHWHILE = 16
CONSIDERABLE = 16
READ_SIZE = 1 << 24


def divide(source: Source, part_bytes: int, corpus_bytes: int | None = None) -> list[tuple[Source, int]]:
    """The parts of a file, each of about `part_bytes` on disk, and their sizes; a file that stays whole is one part.

    Args:
        corpus_bytes: of all files together, if that is known.

    Raises:
        InputError: the file cannot be read.
    """
    size = size_of(source.path)
    if size is None:
        return [(source, part_bytes)]
    parts: list[tuple[Part, int]] = []
    enough = WORTHWHILE * part_bytes
    if corpus_bytes is not None:
        enough = min(enough, max(2 * part_bytes, corpus_bytes // CONSIDERABLE))
    if part_bytes and size > enough and not is_url(source.path):
        if source.path.endswith(".jsonl"):
            parts = list(line_parts(source.path, part_bytes))
        elif source.path.endswith(".parquet"):
            parts = list(row_group_parts(source.path, part_bytes))
    return [(source._replace(part=part), part_size) for part, part_size in parts] or [(source, size)]


def line_parts(path: str, part_bytes: int) -> Iterator[tuple[Part, int]]:
    """Parts of a file of lines, in bytes; each ends with the first line that reaches `part_bytes`."""
    start = first = 0  # of the part: its first byte, and the number of its first line
    position = lines = 0  # of the block: its first byte, and the number of the line that it begins in
    with open_bytes(path) as stream:
        while block := stream.read(READ_SIZE):
            counted = 0
            while True:
                end = block.find(b"\n", max(0, start + part_bytes - 1 - position)) + 1
                if not end:
                    break
                lines += block.count(b"\n", counted, end)
                yield Part(start, position + end, first), position + end - start
                start, first, counted = position + end, lines, end
            lines += block.count(b"\n", counted)
            position += len(block)
    if position > start:
        yield Part(start, position, first), position - start


def row_group_parts(path: str, part_bytes: int) -> Iterator[tuple[Part, int]]:
    """Parts of a parquet file, in row groups."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: is not a whole parquet file ({reason}): fetch it again") from None
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    firsts = [0, *accumulate(group.num_rows for group in groups)]
    start = size = 0
    for number, group in enumerate(groups):
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if size >= part_bytes or number == len(groups) - 1:
            yield Part(start, number + 1, firsts[start]), size
            start, size = number + 1, 0
