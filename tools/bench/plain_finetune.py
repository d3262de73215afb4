"""The straightforward way from Alpaca records to masked rows, for comparison; each library used as documented.

python -m tools.bench.plain_finetune FILE.jsonl OUT.h5 TOKENIZER
"""

from __future__ import annotations

import json
import sys

SEQUENCE, BATCH = 2048, 512


def main(source: str, target: str, tokenizer_file: str) -> None:
    """Each text through the tokenizer; first-fit decreasing; rows of tokens, mask and labels, gzipped by h5py."""
    import h5py
    import numpy as np
    from tokenizers import Tokenizer

    from finetune.conversation import DEFAULT_SYSTEM_PROMPT

    tokenizer = Tokenizer.from_file(tokenizer_file)
    names = ("<s>", "</s>", "<|sys_start|>", "<|sys_end|>", "<|im_start|>", "<|im_end|>")
    vocabulary = tokenizer.get_vocab()
    bos, eos, system_start, system_end, user_start, user_end = (vocabulary[name] for name in names)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    conversations = []
    with open(source, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            user = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
            prompt = [
                bos,
                system_start,
                *encode(DEFAULT_SYSTEM_PROMPT),
                system_end,
                user_start,
                *encode(user),
                user_end,
            ]
            answer = [*encode(record["output"]), eos]
            if len(prompt) + len(answer) <= SEQUENCE:
                conversations.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))

    rows: list[list[int]] = []
    rooms = np.full(len(conversations), SEQUENCE)  # of rows not yet begun, too
    for number in sorted(range(len(conversations)), key=lambda i: -len(conversations[i][0])):
        size = len(conversations[number][0])
        row = int(np.argmax(rooms[: len(rows) + 1] >= size))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        rooms[row] -= size

    order = np.random.default_rng(1).permutation(len(rows))
    with h5py.File(target, "w") as file:
        shape, chunks = (len(rows), 3, SEQUENCE), (1, 3, SEQUENCE)
        file.attrs["n_examples"], file.attrs["tokens"] = len(rows), sum(len(ids) for ids, _ in conversations)
        data = file.create_dataset("data", shape, "i4", chunks=chunks, compression="gzip")
        for begin in range(0, len(rows), BATCH):
            batch = []
            for row in order[begin : begin + BATCH]:
                planes = np.zeros((3, SEQUENCE), np.int32)
                planes[0::2] = eos
                at = 0
                for number in rows[row]:
                    ids, trained = conversations[number]
                    end = at + len(ids)
                    planes[0, at:end] = ids
                    planes[1, at : end - 1] = trained[1:]
                    planes[2, at : end - 1] = ids[1:]
                    at = end
                batch.append(planes)
            data[begin : begin + len(batch)] = np.stack(batch)


if __name__ == "__main__":
    main(*sys.argv[1:])
