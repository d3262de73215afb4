"""The reference's command line for tokenising and packing:

    python data_prep/create_hdf5_dataset.py LMData --params CONFIG.yaml --input_dir … --output_dir … --eos_id 2 …

The same flags and configuration files (sections setup, processing, dataset), one meaning for each: a flag that is given
beats the file, a flag that is not given leaves the file's value alone. It does what `crystalcoder data tokenize` does;
with --reference-compat it does what the reference does, to the byte (see reference_compat.py).

Some options of the reference have nothing to choose here: sequences are always written in batches (write_in_batch), a
run that was stopped always goes on (resume_from_checkpoint), a text is always tokenised whole and exactly
(split_text_to_tokenize, chunk_len_to_split and remove_bos_in_chunks, unless --reference-compat). They, module and
sep_token, which the reference reads and never uses, are accepted so that the published commands and files work.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import yaml

from data_prep.cleaning import Cleaning
from data_prep.errors import InputError, exit_on_bad_input
from data_prep.reference_compat import SUFFIXES, ReferenceOptions, discover, tokenize_like_reference
from data_prep.tokenize_corpus import TokenizeOptions, tokenize_corpus


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


# name -> (section of the configuration file, type, default). None: has none, and is left out where not given.
OPTIONS: dict[str, tuple[str, Any, Any]] = {
    "input_dir": ("setup", str, None),
    "metadata_files": ("setup", str, None),
    "output_dir": ("setup", str, None),
    "processes": ("setup", int, 1),
    "dataset_processor": ("setup", str, "LMDataPreprocessor"),
    "module": ("setup", str, None),
    "tokenizer_type": ("processing", str, "NeoXTokenizer"),
    "encoder_file": ("processing", str, None),
    "eos_id": ("processing", int, None),
    "pad_id": ("processing", int, None),
    "max_seq_length": ("processing", int, 2048),
    "short_seq_prob": ("processing", float, 0.0),
    "output_name": ("processing", str, "examples"),
    "files_per_record": ("processing", int, 50_000),
    "write_in_batch": ("processing", _boolean, False),
    "write_remainder": ("processing", _boolean, True),
    "resume_from_checkpoint": ("processing", _boolean, False),
    "display_pbar": ("processing", _boolean, True),
    "seed": ("processing", int, 0),
    "split_text_to_tokenize": ("processing", _boolean, False),
    "chunk_len_to_split": ("processing", int, 2000),
    "remove_bos_in_chunks": ("processing", _boolean, False),
    "use_ftfy": ("dataset", _boolean, False),
    "ftfy_normalizer": ("dataset", str, "NFC"),
    "wikitext_detokenize": ("dataset", _boolean, False),
    "min_sequence_len": ("dataset", int, 6),
    "pack_sequences": ("dataset", _boolean, True),
    "jsonl_key": ("dataset", str, None),
    "inverted_mask": ("dataset", _boolean, False),
    "sep_token": ("dataset", str, None),
}
# The reference takes these from the command line or its default, never from the file.
REFERENCE_IGNORES_FILE = ("min_sequence_len", "short_seq_prob", "output_name")
# Not in the reference's data_params.json unless given.
UNMENTIONED = ("module", "jsonl_key", "inverted_mask", "input_dir", "metadata_files")


def parse(arguments: list[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """The effective options (flag, else file, else default; None where there is none), and our own flags.

    Raises:
        InputError: a configuration file that is not there, or holds a key or a value that is not known.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["LMData"])
    parser.add_argument("--params", help="configuration file, YAML")
    for name, (_, kind, _) in OPTIONS.items():
        spellings = [f"--{name}"] + (["--ignore_bos_in_split_text"] if name == "remove_bos_in_chunks" else [])
        parser.add_argument(*spellings, dest=name, type=kind)
    parser.add_argument("--reference-compat", action="store_true", help="the reference's arrays, quirks included")
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop")
    parser.add_argument("--overwrite", action="store_true")
    flags = parser.parse_args(arguments)
    values = {name: default for name, (_, _, default) in OPTIONS.items()}
    values |= {
        name: value
        for name, value in _read_config(flags.params).items()
        if not (flags.reference_compat and name in REFERENCE_IGNORES_FILE)
    }
    values |= {name: getattr(flags, name) for name in OPTIONS if getattr(flags, name) is not None}
    if values["pad_id"] is None:
        values["pad_id"] = values["eos_id"]
    return values, flags


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not YAML ({error})") from None
    values = {}
    for section, entries in (content or {}).items():
        known = {name for name, (where, _, _) in OPTIONS.items() if where == section}
        if not known:
            raise InputError(f"{path}: section {section!r} is not known: setup, processing and dataset are")
        for name, value in (entries or {}).items():
            name = "remove_bos_in_chunks" if name == "ignore_bos_in_split_text" else name
            if name not in known:
                raise InputError(f"{path}: {section}.{name} is not known: {', '.join(sorted(known))} are")
            if value is not None:
                values[name] = _checked(path, f"{section}.{name}", OPTIONS[name][1], value)
    return values


def _checked(path: str, name: str, kind: Any, value: Any) -> Any:
    expected = bool if kind is _boolean else kind
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise InputError(f"{path}: {name} is {value!r}, {expected.__name__} is expected")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Tokenise and pack as the flags and the configuration file say."""
    values, flags = parse(arguments)
    for name in ("output_dir", "encoder_file"):
        if not values[name]:
            raise InputError(f"--{name} is missing (or {OPTIONS[name][0]}.{name} in --params)")
    for name in ("tokenizer_type", "dataset_processor"):
        if values[name] != OPTIONS[name][2]:
            raise InputError(f"--{name} {values[name]}: only {OPTIONS[name][2]} is known")
    files = _input_files(values)
    cleaning = Cleaning(values["use_ftfy"], values["ftfy_normalizer"], values["wikitext_detokenize"])
    out = Path(values["output_dir"])
    if flags.reference_compat:
        _reference(values, flags, files, cleaning, out)
    else:
        _default(values, flags, files, cleaning, out)


def _input_files(values: dict[str, Any]) -> list[str]:
    if values["metadata_files"]:
        files = []
        for listing in values["metadata_files"].split(","):
            try:
                files += [line.strip() for line in Path(listing).read_text().splitlines() if line.strip()]
            except OSError as error:
                raise InputError(f"{listing}: cannot be read ({error.strerror})") from None
        unknown = [path for path in files if not path.endswith((*SUFFIXES, ".jsonl.gz", ".json", ".parquet"))]
        if unknown:
            raise InputError(f"{unknown[0]}: is no {', '.join(SUFFIXES)} file")
        if not files:
            raise InputError(f"{values['metadata_files']}: lists no files")
        return files
    if not values["input_dir"]:
        raise InputError("--input_dir or --metadata_files is missing")
    if not Path(values["input_dir"]).is_dir():
        raise InputError(f"{values['input_dir']}: no such folder")
    return []


def _reference(
    values: dict[str, Any], flags: argparse.Namespace, files: list[str], cleaning: Cleaning, out: Path
) -> None:
    if values["eos_id"] is None:
        raise InputError("--eos_id is missing (or processing.eos_id in --params)")
    files = files or discover(Path(values["input_dir"]))
    if not files:
        raise InputError(f"{values['input_dir']}: holds no {', '.join(SUFFIXES)} file")
    fields = {field.name for field in dataclasses.fields(ReferenceOptions)} & set(values)
    options = ReferenceOptions(cleaning=cleaning, on_error=flags.on_error, **{name: values[name] for name in fields})
    given = {name: value for name, value in values.items() if value not in (None, False) or name not in UNMENTIONED}
    sections = {
        section: {name: value for name, value in given.items() if OPTIONS[name][0] == section}
        for section in ("setup", "processing", "dataset")
    }
    tokenize_like_reference(
        files,
        out,
        options,
        processes=values["processes"],
        sections=sections,
        overwrite=flags.overwrite,
        progress=values["display_pbar"],
    )


def _default(
    values: dict[str, Any], flags: argparse.Namespace, files: list[str], cleaning: Cleaning, out: Path
) -> None:
    for name, harmless in (("short_seq_prob", 0), ("inverted_mask", False), ("pack_sequences", True)):
        if values[name] != harmless:
            raise InputError(f"--{name} {values[name]}: loses text or inverts the mask: only with --reference-compat")
    if not values["write_remainder"]:
        raise InputError("--write_remainder False: loses sequences: only with --reference-compat")
    options = TokenizeOptions(
        tokenizer=values["encoder_file"],
        max_seq_length=values["max_seq_length"],
        text_key=values["jsonl_key"],
        on_error=flags.on_error,
        rows_per_file=values["files_per_record"],
        output_name=values["output_name"],
        eos_id=values["eos_id"],
        pad_id=values["pad_id"],
        min_sequence_len=values["min_sequence_len"],
        cleaning=cleaning,
    )
    inputs = files or [values["input_dir"]]
    tokenize_corpus(
        inputs,
        out,
        options,
        processes=values["processes"],
        overwrite=flags.overwrite,
        progress=values["display_pbar"],
    )


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
