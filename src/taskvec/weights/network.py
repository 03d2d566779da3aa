"""Whether the Hugging Face hub answers, asked once: its libraries try again and again for a minute."""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from taskvec.core.errors import TaskvecError

SECONDS = 5.0
"""How long the hub may take to answer, after which there is no network."""


def endpoint() -> str:
    """Return where the hub is."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not address.startswith(("https://", "http://")):
        raise TaskvecError(f"HF_ENDPOINT is '{address}', which is no address", f"write https://{address}")
    return address


def answers(address: str) -> bool:
    """Say whether a server answers at all within ``SECONDS``, name look-up included."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
        except urllib.error.HTTPError:
            answered.set()  # it refuses this question, but it is there
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a host may hang, and no timeout covers it
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()


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
