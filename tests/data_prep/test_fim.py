"""FIM: undoing it gives back the exact text, labels follow tokens, chance depends on the key alone."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.fim import Draws, FimSettings, RowFim, fim_document, undo
from data_prep.packing import Packer, stream_of
from data_prep.tokenizer import Tokenizer
from support.tiny_tokenizer import TEXT

words = st.sampled_from([*TEXT.split(" "), "\n", "  ", "日本", "🙂", "</s>", "<|fim_middle|>", "é", "\x00", "\r\n"])
texts = st.lists(words, max_size=30).map(" ".join) | st.text(max_size=40)
texts = texts.map(lambda text: text.replace("▁", "_").encode(errors="ignore").decode())
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(text=texts, seed=st.integers(0, 99), spm=st.sampled_from([0.0, 1.0]), level=st.sampled_from(["char", "token"]))
def test_document_is_lossless(tokenizer: Tokenizer, text: str, seed: int, spm: float, level: str) -> None:
    """Planted: encoding the middle with the dummy space in front -> "de f" for "def", fails."""
    ids = fim_document(text, tokenizer, FimSettings(1.0, spm, level=level), Draws.of(seed))
    fim = tokenizer.fim_ids
    assert tokenizer.decode(undo(ids, fim)) == text
    if text:
        marks = [i for i in ids if i in (fim.prefix, fim.middle, fim.suffix)]
        assert marks == [fim.prefix, fim.suffix, fim.middle]
        assert (ids[1] == fim.suffix) == (spm == 1.0) or ids[1] == fim.suffix  # an empty prefix looks like SPM


@quick
@given(
    documents=st.lists(texts, min_size=1, max_size=6),
    length=st.integers(8, 200),
    spm=st.sampled_from([0.0, 0.5, 1.0]),
    level=st.sampled_from(["char", "token"]),
    rate=st.sampled_from([0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_rows_are_lossless(
    tokenizer: Tokenizer, documents: list[str], length: int, spm: float, level: str, rate: float, seed: int
) -> None:
    """Each text of a row comes back whole; only the row's last text may have lost its end, never its middle.

    Planted: labels equal to the tokens -> they do not follow, fails; mask one short -> a token under a zero, fails;
    tail of the transform cut instead of the text's end -> the marks of the last text are incomplete, `undo` refuses,
    fails.
    """
    bos, eos, fim = tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids
    packer = Packer(length, eos)
    rows = [packer.add(np.array([bos, *tokenizer.encode(text), eos], np.int32)) for text in documents]
    transform = RowFim(tokenizer, FimSettings(rate, spm, seed, level))
    for number, row in enumerate(np.concatenate([*rows, packer.finish()])):
        result = transform(row, 0, "a.h5", number)
        assert np.array_equal(result, RowFim(tokenizer, transform.settings)(row, 0, "a.h5", number))
        count = int(result[1].sum())
        assert result[1, :count].all()  # padding is only at the end
        assert not result[1, count:].any()
        assert np.array_equal(result[2, : count - 1], result[0, 1:count])
        assert (result[0, count:] == fim.pad).all()
        assert (result[2, count:] == fim.pad).all()
        before, after = split(stream_of(row), eos), split(stream_of(result), eos)
        assert len(after) <= len(before)
        for k, (text, changed) in enumerate(zip(before, after, strict=False)):
            head = [bos] if changed[:1] == [bos] else []
            restored = head + undo(changed[len(head) :], fim)
            if k + 1 < len(after):
                assert raw(tokenizer, restored) == raw(tokenizer, text)
            else:
                assert raw(tokenizer, text).startswith(raw(tokenizer, restored))


def split(stream: np.ndarray, eos: int) -> list[list[int]]:
    return [list(map(int, part[part != eos])) for part in np.split(stream, np.flatnonzero(stream == eos) + 1)]


def raw(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.piece_bytes[i] for i in ids)


@quick
@given(text=texts, seed=st.integers(0, 999))
def test_row_parts_are_what_the_tokenizer_gives(tokenizer: Tokenizer, text: str, seed: int) -> None:
    """The cut ids equal the ids of the cut text, so packed and per-document FIM agree on a whole document.

    Planted: `is_seam` always True -> a word's halves keep the whole word's pieces, fails.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    packer = Packer(3 * len(ids) + 10, tokenizer.eos_id)
    packer.add(np.array(ids, np.int32))
    chosen = FimSettings(1.0, 0.5, seed)
    row = RowFim(tokenizer, chosen)(packer.finish()[0], "key")
    expected = fim_document(text, tokenizer, chosen, Draws.of(seed, "key", 0))
    assert list(stream_of(row)) == [tokenizer.bos_id, *expected, tokenizer.eos_id]


def test_a_text_without_room_for_marks_stays(tokenizer: Tokenizer) -> None:
    """A text that no cut of fits with its marks is left as it is.

    Planted: the empty transform taken instead -> an empty row, fails.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode("🙂" * 40)]
    for length in (2, 3, 4, 5):
        row = Packer(length, tokenizer.eos_id).add(np.array(ids, np.int32))[0]
        for seed in range(40):
            result = RowFim(tokenizer, FimSettings(1.0, 0.5, seed))(row, 0, "a.h5", 0)
            assert result[1].any()
            stream = stream_of(result).tolist()
            assert stream == ids[: length + 1] or tokenizer.fim_ids.middle in stream


def test_a_last_text_of_one_token(tokenizer: Tokenizer) -> None:
    """A full row's last text is left alone where its only token is the first of the next row.

    Planted: that token looked at after it is taken off -> IndexError, fails.
    """
    eos, token = tokenizer.eos_id, tokenizer.encode("the")[0]
    stream = np.array([tokenizer.bos_id, *tokenizer.encode("and then"), eos, token], np.int32)
    row = Packer(len(stream) - 1, eos).add(stream)[0]
    for seed in range(30):  # in a quarter of them the last text is chosen and the one before it is not
        result = stream_of(RowFim(tokenizer, FimSettings(0.5, seed=seed))(row, 0, "a.h5", 0))
        assert result[0] == tokenizer.bos_id
        assert len(result) == len(stream) or tokenizer.fim_ids.middle in result


def test_chances() -> None:
    draws = np.array([Draws.of(1, 0, "a.h5", n, 0) for n in range(4000)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.02
    assert Draws.of(1, 23) != Draws.of(12, 3)  # the key's parts are kept apart
    cuts = np.array([Draws(0, 0, *pair).cuts(3) for pair in draws[:, 2:]])
    assert sorted({tuple(map(int, c)) for c in cuts}) == [(a, b) for a in range(4) for b in range(a, 4)]
