"""The reference's command line for tokenising and packing:

    python data_prep/create_hdf5_dataset.py LMData --params CONFIG.yaml --input_dir … --output_dir … --eos_id 2 …

The same flags and configuration files (sections setup, processing, dataset), one meaning for each: a flag that is given
beats the file, a flag that is not given leaves the file's value alone. It does what `crystalcoder data tokenize` does;
with --reference-compat it does what the reference does, to the byte (see reference_compat.py).

Some options of the reference have nothing to choose here: sequences are always written in batches (write_in_batch), a
run that was stopped always goes on (resume_from_checkpoint), a text is always tokenised whole and exactly
(split_text_to_tokenize, chunk_len_to_split and remove_bos_in_chunks, unless --reference-compat). They, module and
sep_token, which the reference reads and never uses, are accepted so that the published commands and files work; where
one of them asks for something that is not done, a line says so (`notes`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from data_prep.cleaning import Cleaning, normal_form
from data_prep.engine import check_output_name, run_on, stay_one_thread
from data_prep.errors import InputError, exit_on_bad_input
from data_prep.manifest import report
from data_prep.sources import DATA_SUFFIXES, REFERENCE_SUFFIXES


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


class Option(NamedTuple):
    """An option: its section in the configuration file, its type, and what it is where nobody gives it."""

    section: str
    kind: Any
    default: Any = None
    mentioned: bool = False  # the reference's data_params.json has it even where nobody gives it
    published: bool = False  # the published configurations give it


OPTIONS = {
    "input_dir": Option("setup", str),
    "metadata_files": Option("setup", str),
    "output_dir": Option("setup", str),
    "processes": Option("setup", int, 1, published=True),
    "dataset_processor": Option("setup", str, "LMDataPreprocessor", mentioned=True),
    "module": Option("setup", str),
    "tokenizer_type": Option("processing", str, "NeoXTokenizer", published=True),
    "encoder_file": Option("processing", str),
    "eos_id": Option("processing", int, mentioned=True),
    "pad_id": Option("processing", int, mentioned=True),
    "max_seq_length": Option("processing", int, 2048, published=True),
    "short_seq_prob": Option("processing", float, 0.0, mentioned=True),
    "output_name": Option("processing", str, "examples", mentioned=True),
    "files_per_record": Option("processing", int, 50_000, published=True),
    "write_in_batch": Option("processing", _boolean, True, mentioned=True),
    "write_remainder": Option("processing", _boolean, True, mentioned=True),
    "resume_from_checkpoint": Option("processing", _boolean, False, mentioned=True),
    "display_pbar": Option("processing", _boolean, True, mentioned=True),
    "seed": Option("processing", int, 0, published=True),
    "split_text_to_tokenize": Option("processing", _boolean, False, mentioned=True),
    "chunk_len_to_split": Option("processing", int, 2000, mentioned=True),
    "remove_bos_in_chunks": Option("processing", _boolean, False, mentioned=True),
    "use_ftfy": Option("dataset", _boolean, False, mentioned=True),
    "ftfy_normalizer": Option("dataset", str, "NFC", mentioned=True),
    "wikitext_detokenize": Option("dataset", _boolean, False, mentioned=True),
    "min_sequence_len": Option("dataset", int, 6, mentioned=True),
    "pack_sequences": Option("dataset", _boolean, True, mentioned=True),
    "jsonl_key": Option("dataset", str),
    "inverted_mask": Option("dataset", _boolean, False),
    "sep_token": Option("dataset", str, published=True),
}
# Where the reference's own defaults are others.
REFERENCE_DEFAULTS = {"use_ftfy": True}
# The reference takes these from the command line or its default, never from the file.
REFERENCE_IGNORES_FILE = ("min_sequence_len", "short_seq_prob", "output_name")


class Settings(NamedTuple):
    """What the command line and the file say.

    Attributes:
        values: every option: flag, else file, else default; None where there is none.
        given: those that someone gave, by flag or in the file (there also null).
        flags: the command line, with our own flags.
    """

    values: dict[str, Any]
    given: dict[str, Any]
    flags: argparse.Namespace


def parse(arguments: list[str] | None) -> Settings:
    """The command line and the configuration file that it names.

    Raises:
        InputError: a configuration file that is not there, or holds a key or a value that is not known.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["LMData"])
    parser.add_argument("--params", help="configuration file, YAML")
    for name, option in OPTIONS.items():
        spellings = [f"--{name}"] + (["--ignore_bos_in_split_text"] if name == "remove_bos_in_chunks" else [])
        parser.add_argument(*spellings, dest=name, type=option.kind)
    parser.add_argument("--reference-compat", action="store_true", help="the reference's arrays, quirks included")
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--engine", choices=["local", "slurm", "ray"], default="local")
    parser.add_argument("--engine-option", action="append", default=[], help="name=value, for slurm and ray")
    flags = parser.parse_args(arguments)
    given = _read_config(flags.params)
    values = {name: option.default for name, option in OPTIONS.items()}
    if flags.reference_compat:
        values |= REFERENCE_DEFAULTS | ({"display_pbar": False} if flags.params else {})
        given = {name: value for name, value in given.items() if name not in REFERENCE_IGNORES_FILE}
    given |= {name: getattr(flags, name) for name in OPTIONS if getattr(flags, name) is not None}
    values |= {name: value for name, value in given.items() if value is not None}
    if "ftfy_normalizer" in given and given["ftfy_normalizer"] is None:
        values["ftfy_normalizer"] = None  # no normal form: the one option where null is a value
    if values["pad_id"] is None:
        values["pad_id"] = values["eos_id"]
    return Settings(values, given, flags)


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no sections: setup, processing and dataset are expected")
    values = {}
    for section, entries in content.items():
        known = {name for name, option in OPTIONS.items() if option.section == section}
        if not known:
            raise InputError(f"{path}: section {section!r} is not known: setup, processing and dataset are")
        if not isinstance(entries or {}, dict):
            raise InputError(f"{path}: section {section!r} is {entries!r}: options and their values are expected")
        for name, value in (entries or {}).items():
            name = "remove_bos_in_chunks" if name == "ignore_bos_in_split_text" else name
            if name not in known:
                raise InputError(f"{path}: {section}.{name} is not known: {', '.join(sorted(known))} are")
            values[name] = value if value is None else _checked(path, f"{section}.{name}", OPTIONS[name].kind, value)
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
    stay_one_thread()
    settings = parse(arguments)
    values, compat = settings.values, settings.flags.reference_compat
    for name in ("output_dir", "encoder_file"):
        if not values[name]:
            raise InputError(f"--{name} is missing (or {OPTIONS[name].section}.{name} in --params)")
    for name in ("tokenizer_type", "dataset_processor"):
        if values[name] != OPTIONS[name].default:
            raise InputError(f"--{name} {values[name]}: only {OPTIONS[name].default} is known")
    for name in ("chunk_len_to_split", "max_seq_length", "files_per_record"):
        if values[name] < 1:
            raise InputError(f"--{name} {values[name]}: at least 1 is needed")
    check_output_name("--output_name", values["output_name"])
    if not 0 <= values["short_seq_prob"] <= 1:
        raise InputError(f"--short_seq_prob {values['short_seq_prob']}: is a probability, from 0 to 1")
    values["processes"] = values["processes"] or os.cpu_count()  # 0: all
    inputs = _inputs(values, reference_compat=compat)
    cleaning = Cleaning(
        values["use_ftfy"],
        normal_form("--ftfy_normalizer", values["ftfy_normalizer"]),
        values["wikitext_detokenize"],
    )
    with run_on(settings.flags.engine, settings.flags.engine_option):
        manifest = (_reference if compat else _default)(settings, inputs, cleaning)
    report(Path(values["output_dir"]), manifest)
    for note in notes(values, reference_compat=compat):
        print(f"note: {note}")


def notes(values: dict[str, Any], *, reference_compat: bool) -> list[str]:
    """A line for each option that asks for something that is not done."""
    found = {
        "module": values["module"] and "no module is loaded, LMDataPreprocessor is built in",
        "sep_token": values["sep_token"] and "nothing uses it, in the reference neither",
    }
    if not reference_compat:
        whole = "texts are tokenised whole and exactly, with one BOS; only --reference-compat splits them"
        found["split_text_to_tokenize"] = values["split_text_to_tokenize"] and whole
    return [f"{name} {values[name]}: {why}" for name, why in found.items() if why]


def _inputs(values: dict[str, Any], *, reference_compat: bool) -> list[str]:
    """The listed files in their order, else the input folder."""
    if not values["metadata_files"]:
        if not values["input_dir"]:
            raise InputError("--input_dir or --metadata_files is missing")
        if not Path(values["input_dir"]).is_dir():
            raise InputError(f"{values['input_dir']}: no such folder")
        return [values["input_dir"]]
    files = []
    for listing in values["metadata_files"].split(","):
        try:
            files += [line.strip() for line in Path(listing).read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise InputError(f"{listing}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{listing}: byte {error.start}: is not UTF-8: list one path on each line") from None
    known = REFERENCE_SUFFIXES if reference_compat else DATA_SUFFIXES
    if unknown := [path for path in files if not path.endswith(known)]:
        raise InputError(f"{unknown[0]}: is no {', '.join(known)} file: take it off the list")
    if not files:
        raise InputError(f"{values['metadata_files']}: lists no files")
    return files


def _reference(settings: Settings, inputs: list[str], cleaning: Cleaning) -> dict[str, Any]:
    from data_prep.reference_compat import ReferenceOptions, discover, tokenize_like_reference

    values = settings.values
    if values["eos_id"] is None:
        raise InputError("--eos_id is missing (or processing.eos_id in --params)")
    if values["short_seq_prob"] and values["max_seq_length"] < 3:
        raise InputError(f"--max_seq_length {values['max_seq_length']}: at least 3 is needed with --short_seq_prob")
    files = inputs if values["metadata_files"] else discover(Path(inputs[0]))
    if not files:
        raise InputError(f"{inputs[0]}: holds no {', '.join(REFERENCE_SUFFIXES)} file")
    fields = {field.name for field in dataclasses.fields(ReferenceOptions)} & set(values)
    options = ReferenceOptions(
        cleaning=cleaning, on_error=settings.flags.on_error, **{name: values[name] for name in fields}
    )
    mentioned = {name: values[name] for name, option in OPTIONS.items() if option.mentioned} | {"pad_id": None}
    if settings.flags.params is None:  # the keys of the published configurations, which stand for the missing file
        mentioned |= {name: values[name] for name, option in OPTIONS.items() if option.published}
    mentioned |= settings.given
    sections = {
        section: {name: value for name, value in mentioned.items() if OPTIONS[name].section == section}
        for section in ("setup", "processing", "dataset")
    }
    return tokenize_like_reference(
        files,
        Path(values["output_dir"]),
        options,
        processes=values["processes"],
        sections=sections,
        overwrite=settings.flags.overwrite,
        progress=values["display_pbar"],
    )


def _default(settings: Settings, inputs: list[str], cleaning: Cleaning) -> dict[str, Any]:
    from data_prep.tokenize_corpus import TokenizeOptions, tokenize_corpus

    values, flags = settings.values, settings.flags
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
    return tokenize_corpus(
        inputs,
        Path(values["output_dir"]),
        options,
        processes=values["processes"],
        overwrite=flags.overwrite,
        progress=values["display_pbar"],
    )


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
