"""`crystalcoder data download`: the public corpora of the three phases from the Hugging Face hub.

`huggingface_hub` does the transfer: a transfer that breaks is taken up where it broke, and a relaunch fetches only the
files that are not there yet. Then every file is compared with the checksum that the hub has of it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import InputError

# name -> repository on the hub
CORPORA = {
    "slimpajama": "cerebras/SlimPajama-627B",
    "starcoderdata": "bigcode/starcoderdata",  # gated: its terms must be accepted
    "crystalcoder-datasets": "LLM360/CrystalCoderDatasets",
}

_AGAIN = "run the same command again when it is back; what has arrived stays"


def download(corpus: str, out: Path, include: Sequence[str] = (), revision: str = "main") -> int:
    """Fetch the files of a corpus that match one of `include` (all by default) to `out`; how many they are.

    The token of a gated corpus comes from HF_TOKEN or `hf auth login`, the hub's address from HF_ENDPOINT.

    Args:
        corpus: one of CORPORA.
        include: patterns of paths in the repository (`python/*`); a trailing `/` means all below.

    Raises:
        InputError: no connection, no access, a pattern without files, too little space, damaged files.
    """
    if corpus not in CORPORA:
        raise InputError(f"{corpus}: is no corpus known here: use one of {', '.join(CORPORA)}")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file: --out names a folder")
    repository = CORPORA[corpus]
    with told_in_one_line(repository, revision, f"https://huggingface.co/datasets/{repository}"):
        # Here, not above: the import takes a second.
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

        if not sys.stderr.isatty():
            disable_progress_bars()
        endpoint = os.environ.get("HF_ENDPOINT") or None
        api = HfApi(endpoint=endpoint)
        commit = api.dataset_info(repository, revision=revision).sha
        entries = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
        sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        for pattern in include:
            if not any(True for _ in filter_repo_objects(sizes, allow_patterns=pattern)):
                top = sorted({path.split("/")[0] + "/" * ("/" in path) for path in sizes})
                shown = ", ".join(top[:12]) + (", …" if len(top) > 12 else "")
                raise InputError(f"--include {pattern!r}: matches no file of {repository}; it has {shown}")
        wanted = set(filter_repo_objects(sizes, allow_patterns=list(include) or None))
        _check_space(out, {path: sizes[path] for path in wanted})
        out.mkdir(parents=True, exist_ok=True)
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=commit,
            local_dir=out,
            allow_patterns=list(include) or None,
            endpoint=endpoint,
        )
        print(f"{out}: comparing checksums", file=sys.stderr)
        found = api.verify_repo_checksums(repository, repo_type="dataset", revision=commit, local_dir=out)
    faults = [fault["path"] for fault in found.mismatches if fault["path"] in wanted]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise InputError(f"{out / faults[0]}{more}: differs from the hub's checksum: delete it and run again")
    if missing := wanted.intersection(found.missing_paths):
        raise InputError(f"{out}: {len(missing)} files are missing, {min(missing)} first: run the same command again")
    return len(wanted)


def _check_space(out: Path, sizes: dict[str, int]) -> None:
    """Refuse what will not fit, before a day of transfer."""
    needed = sum(size for path, size in sizes.items() if not (out / path).exists())
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{out}: {needed / 1e9:,.1f} GB are to come and {free / 1e9:,.1f} GB are free: "
            "choose another --out, or less with --include"
        )


@contextmanager
def told_in_one_line(repository: str, revision: str, page: str) -> Iterator[None]:
    """Say what the library's exceptions mean to someone who downloads. page: the repository's, for people."""
    from huggingface_hub import errors

    access = f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
    try:
        yield
    except errors.GatedRepoError:
        raise InputError(f"{repository}: is gated and this account has no access: {access}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{repository}: is not to be seen without the right token: {access}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repository}: has no revision {revision!r}: see {page}/commits/main") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise InputError(f"{repository}: offline (is HF_HUB_OFFLINE set?): {_AGAIN}") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{repository}: the hub refuses this token ({status}): {access}") from None
        raise InputError(f"{repository}: the hub answers {status}: {_AGAIN}") from None
    except errors.HTTPError as error:
        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        raise InputError(f"{repository}: no connection to {hub} ({error}): {_AGAIN}") from None
    except OSError as error:
        raise InputError(f"{repository}: {str(error) or type(error).__name__}: {_AGAIN}") from None
