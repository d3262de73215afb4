"""The reference's command for FIM in phase 2: StarCoder's sequences, rate 0.9, two epochs.

    python data_prep/fim_hdf5_stage2.py [--input_dir DIR] [--output_dir DIR] [--tokenizer FILE] [--processes N] …

Without flags it reads and writes where the reference does: data/starcoderdata_tokenized/*.h5 ->
data/StarCoder_fim/epoch_<e>/. It does what `crystalcoder data fim` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.errors import exit_on_bad_input
from data_prep.fim import FimSettings
from data_prep.fim_files import FimSource, fim_files
from data_prep.manifest import report

REFERENCE_PROCESSES = 96


def stage_parser(
    description: str | None, *, input_dir: str, output_dir: str, rate: float, epochs: int
) -> argparse.ArgumentParser:
    """The flags of both FIM stages, with the stage's values as defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, default=Path(input_dir))
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    parser.add_argument("--tokenizer", type=Path, default=Path("tokenizer.json"))
    parser.add_argument("--fim_rate", type=float, default=rate)
    parser.add_argument("--spm_rate", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--level", choices=["char", "token"], default="char")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--reference-compat", action="store_true", help="the reference's arrays, quirks included")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Transform the files of one folder."""
    parser = stage_parser(
        __doc__, input_dir="data/starcoderdata_tokenized", output_dir="data/StarCoder_fim", rate=0.9, epochs=2
    )
    parser.add_argument(
        "--reference-processes",
        type=int,
        default=REFERENCE_PROCESSES,
        help="with --reference-compat: the number of processes that the reference ran with; its seeds depend on it",
    )
    parser.add_argument(
        "--files",
        default="",
        help="names of the files, a,b,c [all, sorted]; the reference's seeds follow the order on its disk",
    )
    flags = parser.parse_args(arguments)
    manifest = fim_files(
        [FimSource(flags.input_dir, names=tuple(filter(None, flags.files.split(","))))],
        flags.output_dir,
        flags.tokenizer,
        FimSettings(flags.fim_rate, flags.spm_rate, flags.seed, flags.level),
        epochs=flags.epochs,
        processes=flags.processes,
        overwrite=flags.overwrite,
        reference_groups=flags.reference_processes if flags.reference_compat else None,
    )
    report(flags.output_dir, manifest)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
