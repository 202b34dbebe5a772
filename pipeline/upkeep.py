"""What a user may say to the commands that look after a store: a frozen model a command, a docstring under each field."""

from typing import Annotated

from pydantic import Field

from pipeline.config import OfStore, Plan

Days = Annotated[float, Field(ge=0)]


class Verify(Plan):
    """Compare every byte of caches with what was published: of all under STORE, of one (CACHE), or with --recompute of the
    task's. Lists all that is wrong, and exits with 1 if anything is."""

    cache: str | None = None
    """start of a fingerprint; where left out: every cache"""
    recompute: Annotated[int, Field(ge=0)] = 0
    """examples of each split of TASK that go through the backbone again, to be compared within the codec's tolerance"""


class Repair(Plan):
    """Mend the caches of a task in the first of STORE: what another of them has whole is copied, damaged chunks are extracted
    again. With the options that extracted it."""


class Explain(OfStore):
    """In what the recipes of two caches differ."""

    a: str = ""
    """start of a cache's fingerprint"""
    b: str = ""
    """of the other's"""


class Du(OfStore):
    """What lies under STORE, and how large it is."""


class Gc(OfStore):
    """What nobody needs: caches that no run, pin or lease holds, what dead builders left, the trash. Says what it would do; with
    --delete caches go to the trash, and from there, after another grace period, for good."""

    grace: Days = 7.0
    """what is younger stays, in days by the store's clock"""
    delete: bool = False
    """do it"""


class _OfCache(OfStore):
    cache: str = ""
    """start of a fingerprint"""


class Pin(_OfCache):
    """Hold a cache under a name, so that `gc` leaves it."""

    name: str = ""
    """letters, digits, _ . -"""
    why: str = ""
    """a note"""


class Unpin(_OfCache):
    """Let go of a pin."""

    name: str = ""
    """the pin's name"""


class Push(OfStore):
    """Copy caches to another store, each object compared with its digest."""

    cache: str = ""
    """starts of fingerprints, comma-separated; `all`: every cache"""
    to: str = ""
    """folder or s3://bucket/prefix"""


class Pull(OfStore):
    """Copy caches from another store to the first of STORE, each object compared with its digest."""

    cache: str = ""
    """starts of fingerprints, comma-separated; `all`: every cache"""
    source: str = ""
    """folder or s3://bucket/prefix"""
