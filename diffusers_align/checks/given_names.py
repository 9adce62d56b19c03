"""What a name that somebody gives may stand for, a path or a repository of the Hub, and what to say if it stands for nothing."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(name: str) -> bool:
    """Whether it has the form of a Hub repository, `owner/name`, and is no path by its look."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.startswith((".", "~")) and not name.endswith((".safetensors", ".ckpt", ".bin"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'mini-sd'?`, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest_path(path: str | Path) -> str:
    """` In DIR there are: ...`: what lies where the path leads to nothing, to find the slip."""
    parent = Path(path).expanduser().absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    found = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return f" {parent} has: {shown}." if found else f" {parent} is empty."


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and what it came of."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def is_hub_error(error: BaseException) -> bool:
    """Whether it comes of a request to the Hub."""
    return any(type(cause).__module__.split(".")[0] in _CLIENTS for cause in _chain(error))


def hub_reason(error: BaseException) -> str:
    """In a sentence, why the Hub gave nothing."""
    causes = _chain(error)
    for cause in causes:
        if isinstance(cause, errors.GatedRepoError):
            return "its authors ask for an agreement: accept it on the model's page, then `hf auth login`"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return "the Hub has no repository of that name, or a private one (`hf auth login`)"
        if isinstance(cause, errors.RevisionNotFoundError):
            return "the repository has no such revision"
    cache = huggingface_hub.constants.HF_HUB_CACHE
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set, and the cache {cache} does not hold it: fetch it once with a network, or unset HF_HUB_OFFLINE"
    if any(isinstance(cause, (errors.LocalEntryNotFoundError, ConnectionError)) or "Connect" in type(cause).__name__ for cause in causes):
        endpoint = huggingface_hub.constants.ENDPOINT
        return f"{endpoint} could not be reached, and the cache {cache} does not hold it: look at the network (HF_ENDPOINT, proxies), or give a folder"
    return str(causes[0]).splitlines()[0] if str(causes[0]) else type(causes[0]).__name__


@contextmanager
def fetched(name: str, what: str = "model") -> Iterator[None]:
    """Around what loads `name`, a path or a repository: says in a sentence what the Hub lacks, if it fails of that.

    Args:
        what: it is, for the message.

    Raises:
        FileNotFoundError: it could not be had.
    """
    try:
        yield
    except Exception as error:
        if not is_hub_error(error) or os.path.exists(os.path.expanduser(name)):  # not Path.exists, which raises for what is too long to be a name
            raise
        raise FileNotFoundError(f"No {what} {name!r}: there is no such folder here, and from the Hub: {hub_reason(error)}.") from error
