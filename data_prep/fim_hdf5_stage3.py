"""The reference's command for FIM in phase 3: four languages, rate 0.3, three epochs.

    python data_prep/fim_hdf5_stage3.py [--input_dir DIR] [--output_dir DIR] [--languages L,L] [--tokenizer FILE] …

Without flags it reads and writes where the reference does: data/starcoderdata_tokenized_stage3_split/train/<language>/
*.h5 -> data/starcoderdata_tokenized_stage3_split_fim_0.3/train/<language>_<e>/.
"""

from __future__ import annotations

from data_prep.errors import exit_on_bad_input
from data_prep.fim import FimSettings
from data_prep.fim_files import FimSource, fim_files
from data_prep.fim_hdf5_stage2 import stage_parser
from data_prep.manifest import report

SPLIT = "data/starcoderdata_tokenized_stage3_split"
LANGUAGES = ("python", "css", "html", "javascript")


def main(arguments: list[str] | None = None) -> None:
    """Transform the files of the languages' folders."""
    parser = stage_parser(__doc__, input_dir=f"{SPLIT}/train", output_dir=f"{SPLIT}_fim_0.3/train", rate=0.3, epochs=3)
    parser.add_argument("--languages", default=",".join(LANGUAGES), help="folders below --input_dir, in this order")
    flags = parser.parse_args(arguments)
    manifest = fim_files(
        [FimSource(flags.input_dir / language, language + "_{}") for language in flags.languages.split(",")],
        flags.output_dir,
        flags.tokenizer,
        FimSettings(flags.fim_rate, flags.spm_rate, flags.seed, flags.level),
        epochs=flags.epochs,
        processes=flags.processes,
        overwrite=flags.overwrite,
        reference_groups=0 if flags.reference_compat else None,
    )
    report(flags.output_dir, manifest)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
