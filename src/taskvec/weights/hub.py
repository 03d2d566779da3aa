"""The Hugging Face hub: what its caches hold, whether it answers, and downloads that fail soon with no network.

Whether it answers is asked once: its libraries try again and again for a minute.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from taskvec.core.errors import TaskvecError, first_line
from taskvec.weights.formats import refuse_pickle

SECONDS = 5.0
"""How long the hub may take to answer, after which there is no network."""


# ---------------------------------------------------------------- caches


def caches() -> Path:
    """Return the folder of the hub's caches on this machine."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def has_repository(repo: str) -> bool:
    """Say whether the cache holds anything of a repository of models; no library is needed."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or caches() / "hub")
    return (cache / f"models--{repo.replace('/', '--')}").is_dir()


def has_dataset(name: str) -> bool:
    """Say whether the cache of data sets holds anything of one; no library is needed."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or caches() / "datasets")
    return (cache / name.replace("/", "___")).is_dir()


def cached(repo: str, file: str) -> Path | None:
    """Return the file in the hub's cache on this machine, or None; nothing is asked of the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repo, file)
    except HFValidationError as error:
        raise TaskvecError(f"'{repo}' names no repository of the hub: {first_line(error)}", "give OWNER/NAME") from None
    return Path(path) if isinstance(path, str) else None


def first_cached(repo: str, files: Sequence[str]) -> Path | None:
    """Return the first of ``files`` that the cache holds, or None."""
    return next((path for file in files if (path := cached(repo, file))), None)


# ---------------------------------------------------------------- downloads


def fetch(repo: str, files: Sequence[str], allow_pickle: bool, wanted: str, instead: str) -> Path:
    """Return the first of ``files`` that the cache or else the hub holds; what is in the cache is not asked for again.

    ``wanted`` is the address that needs it and ``instead`` what to give with no network; both are in the error, which
    comes within seconds: the hub is asked once.
    """
    safe = [file for file in files if allow_pickle or file.endswith((".safetensors", ".json"))]
    path = first_cached(repo, safe)
    for file in safe if path is None else ():
        if exists(repo, file, wanted, instead):
            return download(repo, file, wanted, instead)
    if path is None and len(safe) < len(files):
        refuse_pickle(f"{repo}/{next(file for file in files if file not in safe)}", allow_pickle)
    if path is None:
        raise TaskvecError(f"'{wanted}' needs {' or '.join(files)} of '{repo}', which the hub does not hold", instead)
    return path


def exists(repo: str, file: str, wanted: str, instead: str) -> bool:
    """Ask the hub once, and for at most a few seconds, whether it holds a file; raise where it does not answer."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    asked = f"'{wanted}' needs {file} of the Hugging Face hub's repository '{repo}'"
    if constants.HF_HUB_OFFLINE:
        raise TaskvecError(f"{asked}, which is not in the cache, and HF_HUB_OFFLINE is set", instead)
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repo, file), timeout=SECONDS)
            answers.put(None)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()  # looking up a host may hang, and no timeout covers it
    try:
        answer = answers.get(timeout=1.5 * SECONDS)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {1.5 * SECONDS:g} s")
    if isinstance(answer, EntryNotFoundError):
        return False
    if answer is not None:
        raise TaskvecError(f"{asked}, and {constants.ENDPOINT} says: {first_line(answer)}", instead)
    return True


def download(repo: str, file: str, wanted: str, instead: str) -> Path:
    """Download a file into the hub's cache and return its path there."""
    from huggingface_hub import hf_hub_download

    print(f"'{wanted}': downloading {file} of '{repo}' from the Hugging Face hub", file=sys.stderr)
    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # hub and network libraries raise their own many kinds
        raise TaskvecError(f"'{wanted}': downloading {repo}/{file} broke off: {first_line(error)}", instead) from None


# ---------------------------------------------------------------- the network


def endpoint() -> str:
    """Return where the hub is."""
    found = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not found.startswith(("https://", "http://")):
        raise TaskvecError(f"HF_ENDPOINT is '{found}', which is no address", f"write https://{found}")
    return found


def answers(address: str) -> bool:
    """Say whether a server answers at all within ``SECONDS``, name look-up included."""
    found = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
        except urllib.error.HTTPError:
            found.set()  # it refuses this question, but it is there
        except (OSError, ValueError, http.client.HTTPException):
            return
        found.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a host may hang, and no timeout covers it
    asking.start()
    asking.join(SECONDS)
    return found.is_set()


@contextlib.contextmanager
def asked_once(local: bool = False) -> Iterator[bool]:
    """Let libraries read the hub's cache only, where it does not answer or ``local`` says that it is not needed.

    They would ask again and again for a minute. Yields whether the hub is left alone.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local or not answers(endpoint())
    try:
        yield constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before
