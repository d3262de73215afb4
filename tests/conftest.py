"""Fixtures that every room's tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout: where rank_cmd_phase2.sh and params/ are."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's numerical truth (reference checkpoints, logits, data), kept beside the checkout, never in it."""
    path = Path(os.environ.get("CRYSTALCODER_SHARED", ROOT.parent / "shared"))
    if not (path / "fixtures").is_dir():
        pytest.skip(f"the reference fixtures are not at {path}: set CRYSTALCODER_SHARED to the folder that holds them")
    return path
