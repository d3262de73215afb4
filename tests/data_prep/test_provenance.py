"""Each sequence knows its documents, through per-document FIM, FIM on rows and shuffling."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.commands import main
from data_prep.errors import InputError
from data_prep.packing import Packer, stream_of
from data_prep.provenance import SpanTracker
from data_prep.sequences import SequenceFile, SequenceWriter, sequence_files
from data_prep.tokenizer import Tokenizer


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=20), length=st.integers(2, 40))
def test_spans_lead_back_to_the_tokens(lengths: list[int], length: int) -> None:
    """Every token of every window is the one that its span points to. Planted: `start` without max(0, …), and
    `start` counted from the window's end -> other tokens, both fail."""
    documents = [np.arange(1000 * number, 1000 * number + n, dtype=np.int32) for number, n in enumerate(lengths)]
    packer, tracker = Packer(length, 0), SpanTracker(length)
    rows, windows = [], []
    for number, document in enumerate(documents):
        tracker.add("file", number, len(document))
        rows.extend(packer.add(document))
        windows += tracker.take(len(rows) - len(windows))
    rows.extend(packer.finish())
    windows += tracker.take(len(rows) - len(windows))
    for row, spans in zip(rows, windows, strict=True):
        count = int(row[1].sum())
        rebuilt = np.concatenate([documents[span.document][span.start :] for span in spans])[:count]
        assert np.array_equal(row[0, :count], rebuilt)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """Two files of documents that each name themselves, tokenised, FIM'd in two epochs, shuffled."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = np.random.default_rng(0)
    (folder / "in").mkdir()
    for name in ("a", "b"):
        with (folder / f"in/{name}.jsonl").open("w") as lines:
            for number in range(60):
                text = f"{name}{number}. " * int(generator.integers(1, 30))
                lines.write(json.dumps({"text": text}) + "\n")
    common = ["--tokenizer", str(tokenizer_file)]
    main(["tokenize", str(folder / "in"), "--out", str(folder / "tok"), *common, "--max-seq-length", "128"])
    main(["fim", str(folder / "tok"), "--out", str(folder / "fim"), *common, "--rate", "0.8", "--epochs", "2"])
    main(["shuffle", str(folder / "fim"), str(folder / "tok"), "--out", str(folder / "shuffled"), "--files", "3"])
    return folder


def test_names_in_the_text_are_names_in_the_spans(prepared: Path, tokenizer: Tokenizer) -> None:
    """After all steps: the documents that a sequence's text names are those of its spans."""
    checked = 0
    for path in sequence_files(prepared / "shuffled"):
        file = SequenceFile(path)
        for number, row in enumerate(file.rows()):
            spans = file.spans(number)
            assert spans
            expected = {f"{Path(span.path).stem}{span.document}" for span in spans}
            text = tokenizer.decode_inside(stream_of(row))
            whole = {word.strip(".") for word in text.split()[1:-1] if word.endswith(".") and word[0] in "ab"}
            named = {name for name in whole if name[1:].isdigit()}
            # A name cut at a window's or a cut's edge may look like a shorter one.
            strangers = {name for name in named - expected if not any(e.startswith(name) for e in expected)}
            assert not {s for s in strangers if text.count(f" {s}. ") > 1}
            checked += bool(named & expected)
    assert checked > 20


def share_of(folder: Path) -> float:
    """What provenance takes of the deflated rows."""
    data = spans = 0
    for path in sequence_files(folder, recursive=True):
        with h5py.File(path) as file:
            data += file["data"].id.get_storage_size()
            spans += sum(dataset.id.get_storage_size() for dataset in file["provenance"].values())
    return spans / data


def test_size_on_made_text(tmp_path: Path, tokenizer_file: Path) -> None:
    """Under 3 % of the deflated rows at 2048, for documents of 200 tokens, through FIM in two epochs and shuffling.

    Lengths are lognormal with a median of 25 words, words follow Zipf's law: about 3 kB a row, as real text has.
    Planted: no gzip for the columns of `ProvenanceWriter.save` -> 4 % after tokenising, fails.
    """
    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("etaoinshrdlu"), generator.integers(2, 9))) for _ in range(3000)])
    (tmp_path / "in").mkdir()
    for number in range(20):
        lengths = np.clip(generator.lognormal(np.log(25), 1, 400), 5, 5000).astype(int)
        texts = [" ".join(words[generator.zipf(1.3, length) % len(words)]) for length in lengths]
        (tmp_path / f"in/chunk_{number:03d}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    common = ["--tokenizer", str(tokenizer_file)]
    main(["tokenize", str(tmp_path / "in"), "--out", str(tmp_path / "tok"), *common, "--max-seq-length", "2048"])
    main(["fim", str(tmp_path / "tok"), "--out", str(tmp_path / "fim"), *common, "--rate", "0.9", "--epochs", "2"])
    main(["shuffle", str(tmp_path / "fim"), "--out", str(tmp_path / "shuffled"), "--files", "4"])
    manifest = json.loads((tmp_path / "tok/manifest.json").read_text())
    assert manifest["counts"]["documents"] == 8000
    for step in ("tok", "fim", "shuffled"):
        assert 0 < share_of(tmp_path / step) < 0.03


def test_size_on_real_code(shared: Path, tmp_path: Path) -> None:
    """Under 3 % of the deflated data, before and after shuffling, at 2048."""
    main(["tokenize", str(shared / "fixtures/data/input/starcoderdata"), "--out", str(tmp_path / "tok"), "--tokenizer",
          str(shared / "data/llama_tokenizer.json"), "--max-seq-length", "2048"])  # fmt: skip
    main(["shuffle", str(tmp_path / "tok"), "--out", str(tmp_path / "shuffled"), "--files", "1"])
    for step in ("tok", "shuffled"):
        assert share_of(tmp_path / step) < 0.03


def test_locate(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = SequenceFile(prepared / "shuffled/data-00001.h5")
    first = len(SequenceFile(prepared / "shuffled/data-00000.h5"))
    spans = file.spans(2)
    capsys.readouterr()
    main(["locate", str(prepared / "shuffled"), str(first + 2)])
    shown = capsys.readouterr().out
    for span in spans or []:
        assert f"{span.path} document {span.document}, from its token {span.start} on" in shown
        assert f"{Path(span.path).stem}{span.document}. " in shown
    with pytest.raises(InputError, match="is not there"):
        main(["locate", str(prepared / "shuffled"), "99999"])
    with SequenceWriter(prepared / "bare.h5", 128) as writer:
        writer.write(np.stack(list(file.rows())))
    with pytest.raises(InputError, match="does not say where"):
        main(["locate", str(prepared / "bare.h5"), "0"])
