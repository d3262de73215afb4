"""The step split: a folder's files into halves by even and odd number, DIR_part0of2 and DIR_part1of2.

The reference trains phase 1 on one half of SlimPajama and phase 2 on the other. The halves are folders of relative
symbolic links, so nothing is copied.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from data_prep.errors import InputError
from data_prep.sequences import sequence_files

NUMBERED = re.compile(r"data-(\d+)\.h5\Z")


def split_by_parity(folder: Path) -> tuple[Path, Path]:
    """Link the sequence files of `folder` into `<folder>_part0of2` (even) and `<folder>_part1of2` (odd).

    A file's number is the one in its name where all are named `data-NNNNN.h5` (as shuffled files are), else its place
    in the sorted folder. Other links there are removed; a half that holds anything else is refused.

    Raises:
        InputError: no sequence files, or a half that is in the way.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_file():
        raise InputError(f"{folder}: is a file: name the folder of the files to split")
    files = sequence_files(folder)
    matches = [NUMBERED.match(path.name) for path in files]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(files):
        numbers = list(range(len(files)))
    halves = tuple(folder.with_name(f"{folder.name}_part{half}of2") for half in range(2))
    for half in halves:
        if half.exists() and (not half.is_dir() or any(not p.is_symlink() for p in half.iterdir())):
            raise InputError(f"{half}: is in the way (it holds more than links): move it")
    links = {
        halves[number % 2] / path.name: Path("..", folder.name, path.name)
        for path, number in zip(files, numbers, strict=True)
    }
    for half in halves:
        half.mkdir(exist_ok=True)
        for link in half.iterdir():
            if link not in links or link.readlink() != links[link]:
                link.unlink()
    for link, target in links.items():
        if not link.is_symlink():  # those that are right stay: someone may be training on them
            link.symlink_to(target)
    return halves[0], halves[1]
