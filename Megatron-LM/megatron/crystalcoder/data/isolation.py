"""Where documents begin in rows of whole documents, and each token's position in its own.

In such rows (`finetune prepare --packing best-fit`) the label of a document's last token is padding, so a token that is
not the label before it begins a document. Rows that are windows of one stream have no such token: each is one document.
"""

from __future__ import annotations

import torch
from torch import Tensor


def documents_and_positions(tokens_bs: Tensor, labels_bs: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of tokens and labels (b, s): the number of each token's document in its row, from 0, and its position in
    that document; both int64 (b, s)."""
    begins = torch.zeros_like(tokens_bs, dtype=torch.bool)
    begins[:, 1:] = tokens_bs[:, 1:] != labels_bs[:, :-1]
    places = torch.arange(tokens_bs.shape[1]).expand_as(tokens_bs)
    starts = torch.where(begins, places, 0).cummax(dim=1).values
    return begins.long().cumsum(dim=1), places - starts
