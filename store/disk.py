"""Whether a folder lies on a disk where reading here and there is as fast as reading on: what the system says, no measuring.

The order of training follows from it, so that it must not change from one run to the next.
"""

import os
import re
from pathlib import Path

LOCAL = {"apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
"""file systems of this machine's own disks; anything else (nfs, lustre, cifs, fuse, …) may be far away"""


def fast(folder: Path, system: Path = Path("/")) -> tuple[bool, str]:
    """Whether it is on a local disk without moving parts, and why. system: where /proc and /sys are."""
    place, kind, device = _mount(folder.resolve(), system)
    if kind is None:
        return False, "where it lies cannot be told"
    if kind not in LOCAL:
        return False, f"{kind} at {place} is no local file system"
    if _rotates(device, system):
        return False, f"{kind} at {place} is on a rotating disk"
    return True, f"{kind} at {place} is a local disk"


def _mount(folder: Path, system: Path) -> tuple[str, str | None, str]:
    """Where the file system of a folder is mounted, its type, and its device as major:minor."""
    try:
        lines = (system / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "", None, ""
    best: tuple[str, str | None, str] = ("", None, "")
    for line in lines:
        about, _, source = line.partition(" - ")
        _, _, device, _, place, *_ = about.split(" ")
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)
        if len(place) >= len(best[0]) and folder.is_relative_to(place):
            best = (place, source.split(" ")[0], device)
    return best


def _rotates(device: str, system: Path) -> bool:
    """Whether a block device says that it rotates. What a virtual one says means nothing: it does not know its host's disk."""
    block = system / "sys/dev/block" / device
    disk = block.resolve().name
    # a partition's queue is that of its disk
    for queue in (block / "queue/rotational", block / "../queue/rotational"):
        try:
            return queue.read_text().strip() == "1" and not re.match(r"(vd|xvd|nbd|zram|loop)", os.path.basename(disk))
        except OSError:
            continue
    return False
