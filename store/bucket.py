"""A store, or a cache in one, at s3://bucket/prefix. Sole home of obstore.

Nothing can be renamed there, and two writers of one key would take turns. So a cache's objects lie under a name of their
writer's own, and the manifest, which says that name, is created if it is not there yet: that is the one stroke.

    <root>/objects/<fingerprint>/<write>/…        chunks, tables, metadata
    <root>/caches/<fingerprint>/manifest.json     created last, once
"""

import hashlib
import importlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

from store.errors import Refused

SCHEME = "s3://"
RETRY: dict[str, Any] = {"max_retries": 6, "retry_timeout": timedelta(seconds=90)}
"""of a request that fails by the network or with 5xx"""
TIMEOUT = timedelta(seconds=60)
"""of one request"""


class Listed(NamedTuple):
    """What a listing says of an object."""

    size: int
    """in bytes"""
    tag: str
    """changes with its content"""
    written: float
    """when, by the store's clock, in seconds"""


class Bucket:
    """Objects by their paths under an address. May be sent to workers, or forked with them."""

    def __init__(self, address: str) -> None:
        """Raises Refused for an address of no place, and where obstore is not installed."""
        self.address = address.rstrip("/")
        if not self.address.removeprefix(SCHEME.rstrip("/")).strip("/"):
            raise Refused(f"{address} names no place; give all of it: s3://bucket/prefix")
        self._process, self._store = -1, None
        _ = self.store

    def __str__(self) -> str:
        return self.address

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_process": -1, "_store": None}

    @property
    def store(self) -> Any:
        """obstore's own, one a process: its threads are not forked."""
        if self._process != os.getpid():
            try:
                obstore = importlib.import_module("obstore.store")
            except ImportError:
                raise Refused(f"{self.address} needs obstore: pip install 'readcache[s3]'") from None
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
            options = {"allow_http": endpoint.startswith("http://"), "timeout": TIMEOUT}
            config = {"endpoint": endpoint} if endpoint else None
            with _reaching(self.address, ""):
                self._store = obstore.from_url(self.address, config=config, client_options=options, retry_config=RETRY)
            self._process = os.getpid()
        return self._store

    def below(self, place: str) -> "Bucket":
        """The objects under a path."""
        return Bucket(f"{self.address}/{place}")

    def read(self, place: str, most: int | None = None) -> bytes:
        with _reaching(self.address, place):
            found = self.store.get(place)
            size = int(found.meta["size"])
            data = bytes(found.bytes()) if most is None or size <= most else None
        if data is None:
            raise ValueError(f"it has {size:,} bytes, and at most {most:,} are read")
        return data

    def sizes(self) -> dict[str, int]:
        return {place: about.size for place, about in self.listing("").items()}

    def sha256(self, place: str) -> str:
        return hashlib.sha256(self.read(place)).hexdigest()

    def written(self, fingerprint: str, write: str) -> "Bucket":
        return Bucket(f"{self.address.rsplit('/', 2)[0]}/objects/{fingerprint}/{write}")

    def listing(self, prefix: str) -> dict[str, Listed]:
        """What there is under a path, by path."""
        with _reaching(self.address, prefix):
            return {
                item["path"]: Listed(int(item["size"]), str(item["e_tag"]), item["last_modified"].timestamp())
                for part in self.store.list(prefix or None)
                for item in part
            }

    def put(self, place: str, data: bytes) -> None:
        """Write a whole object, over what was there."""
        with _reaching(self.address, place):
            self.store.put(place, data, use_multipart=False)

    def create(self, place: str, data: bytes) -> bool:
        """Write an object where there is none; whether it is ours that is there now.

        An answer that was lost leaves it open who came first: what is there says it, so data must say whose they are.
        """
        try:
            self.store.put(place, data, mode="create", use_multipart=False)
            return True
        except Exception as error:  # exists already, refused, or nobody knows
            try:
                return self.read(place) == data
            except FileNotFoundError:
                raise _refused(self.address, place, error) from None

    def now(self) -> float:
        """The time by the store's clock, in seconds."""
        place = f".clock-{secrets.token_hex(4)}"
        self.put(place, b"")
        with _reaching(self.address, place):
            written: float = self.store.head(place)["last_modified"].timestamp()
        self.delete([place])
        return written

    def delete(self, places: Iterable[str]) -> None:
        """Remove objects; what is gone already is gone."""
        for place in places:
            with _reaching(self.address, place):
                try:
                    self.store.delete(place)
                except FileNotFoundError:
                    pass


@contextmanager
def _reaching(address: str, place: str) -> Iterator[None]:
    """Tells what is not there (FileNotFoundError) from what cannot be had now: Refused, whatever is raised below."""
    try:
        yield
    except (FileNotFoundError, Refused):
        raise
    except Exception as error:
        raise _refused(address, place, error) from None


def _refused(address: str, place: str, error: Exception) -> Refused:
    why = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])[:200]}"
    return Refused(f"{address}/{place} cannot be had ({why}); see to the connection and to your rights, then try again")
