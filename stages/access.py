"""How stage two reads caches: kept in memory, rows at random, or windows of chunks; chosen from sizes and the disk."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from store import disk
from store.codecs import parse
from store.errors import Refused
from store.mapped import MOST_FILES
from store.reader import Cache


@dataclass(frozen=True)
class Access:
    """A way to read, and its limits."""

    how: Literal["auto", "memory", "random", "windows"] = "auto"
    """memory: decoded once and kept on the device. random: rows of any examples from the chunk files, mapped. windows: whole
    chunks, some at a time, whose examples are shuffled among themselves. auto: the first of these that goes"""
    memory_bytes: int = 2 << 30
    """what all of a run's caches may take, decoded, where `auto` is to keep them in memory, in bytes"""
    window_bytes: int = 1 << 30
    """of one window, in bytes; at most two are in memory"""
    readers: int = 2
    """threads that read ahead"""


ONCE = Access("windows", window_bytes=256 << 20)
"""for what is read a single time, in order"""


class Choice(NamedTuple):
    """What was chosen."""

    access: Access
    """never auto"""
    why: str
    """for the user, in half a sentence"""


def check_codec(name: str, how: str) -> None:
    """Refuse a codec that is not there, and `random` for one that compresses."""
    if parse(name)[1] and how == "random":
        raise Refused(f"reading.access=random needs chunks as they are, and {name} compresses them; give windows, memory or auto")


def choose(access: Access, caches: Iterable[Cache], streams: Iterable[str], device: torch.device) -> Choice:
    """Settle `auto` for all the caches of a run together. Raises Refused for `random` on a compressed or remote cache."""
    every, streams = list(caches), list(streams)
    whole = next((cache.why_whole for cache in every if cache.why_whole), None)
    if whole and access.how == "random":
        raise Refused(f"reading.access=random needs rows by themselves, and {whole}; give windows, memory or auto")
    if access.how != "auto":
        return Choice(access, "as asked for")
    needed, limit = sum(decoded_bytes(cache, streams) for cache in every), _limit(access, device)
    if needed <= limit:
        return Choice(replace(access, how="memory"), f"decoded they are {needed:,} bytes, at most {limit:,} may be kept")
    if whole:
        return Choice(replace(access, how="windows"), whole)
    files = sum(a.chunk_count() for cache in every for stream in streams for a in cache.stored(stream).values())
    if files > MOST_FILES:
        return Choice(replace(access, how="windows"), f"they have {files:,} files, and {MOST_FILES:,} can be mapped")
    verdicts = [disk.fast(cache.path) for cache in every]
    why = next((why for fast, why in verdicts if not fast), verdicts[0][1])
    return Choice(replace(access, how="random" if all(fast for fast, _ in verdicts) else "windows"), why)


def decoded_bytes(cache: Cache, streams: Iterable[str]) -> int:
    """What a cache's rows of some streams take as float32, in bytes."""
    total = 0
    for stream in streams:
        attention = cache.stored(stream).get("cross_attention")
        numbers = len(cache.states[stream]) * cache.width + (attention.chunks[1] if attention else 0)
        total += 4 * numbers * int(cache.place(stream)[1].sum())
    return total


def _limit(access: Access, device: torch.device) -> int:
    """In bytes; of a GPU's memory at most a quarter, free or not: the order of training may not follow from who else is on it."""
    if device.type != "cuda":
        return access.memory_bytes
    return min(access.memory_bytes, torch.cuda.get_device_properties(device).total_memory // 4)
