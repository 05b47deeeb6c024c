"""Which of several servers answers a call: all calls of one trajectory go to the one that holds its prefix.

Rendezvous hashing: a key ranks the replicas by a hash of both, and its calls go to the first one. A dead replica's
keys move to their second one, each key to its own; all others stay where they are. (Rendezvous hashing: Thaler and
Ravishankar, 1998.)

Tests: tests/recipes/decoding/test_replicas.py.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

REVIVE_AFTER_S = 15.0


@dataclass(slots=True)
class Replica:
    """One server.

    Attributes:
        url: Base URL, e.g. http://localhost:8000/v1.
        dead_until: When its keys come back to it after it was found dead, in `time.monotonic()` seconds.
    """

    url: str
    dead_until: float = 0.0

    @property
    def name(self) -> str:
        """Host and port; a user name or password in the URL stays out of messages and files."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)

    @property
    def dead(self) -> bool:
        """Whether its keys go elsewhere for now."""
        return time.monotonic() < self.dead_until

    def bury(self) -> None:
        """Sends its keys elsewhere for a while; then the next call tries it again."""
        self.dead_until = time.monotonic() + REVIVE_AFTER_S


class Replicas:
    """The servers of one engine.

    Args:
        urls: Base URLs.
    Raises:
        ValueError: No URL, no http(s) URL, or one that stands twice.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.all = [Replica(url.rstrip("/")) for url in urls]
        if not self.all:
            raise ValueError("base_urls must hold at least one URL, got none; e.g. http://localhost:8000/v1")
        for replica in self.all:
            if not replica.url.startswith(("http://", "https://")):
                shown = replica.url.rpartition("@")[2]
                raise ValueError(f"base_urls must be http(s) URLs, got {shown!r}; e.g. http://localhost:8000/v1")
        if len({replica.url for replica in self.all}) < len(self.all):
            raise ValueError("base_urls must be distinct, got one of them twice; drop it")

    def ranked(self, key: str) -> list[Replica]:
        """All replicas, the home of `key` first."""
        if len(self.all) == 1:
            return self.all
        return sorted(self.all, key=lambda replica: hashlib.blake2b(f"{key}\n{replica.url}".encode()).digest())

    def pick(self, key: str) -> Replica:
        """The home of `key`, or the next one that is not dead; the home if all are."""
        ranked = self.ranked(key)
        return next((replica for replica in ranked if not replica.dead), ranked[0])
