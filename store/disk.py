"""Whether a folder lies on a disk where reading here and there is as fast as reading on: what the system says, no measuring.

The order of training follows from it, so that it must not change from one run to the next.
"""

import re
from pathlib import Path

LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
"""file systems of this machine's own disks; anything else (nfs, lustre, cifs, fuse, …) may be far away"""


def fast(folder: Path, system: Path = Path("/")) -> tuple[bool, str]:
    """Whether it is on a local disk without moving parts, and why. system: where /proc and /sys are."""
    place, kind, block = _mount(folder.resolve(), system)
    if kind is None:
        return False, "where it lies cannot be told"
    if kind not in LOCAL:
        return False, f"{kind} at {place} is no local file system"
    if _rotates(block):
        return False, f"{kind} at {place} is on a rotating disk"
    return True, f"{kind} at {place} is a local disk"


def _mount(folder: Path, system: Path) -> tuple[str, str | None, list[Path]]:
    """Where the file system of a folder is mounted, its type, and where /sys may tell of its disk."""
    best: tuple[str, str | None, list[Path]] = ("", None, [])
    try:
        lines = (system / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return best
    for line in lines:
        about, _, behind = line.partition(" - ")
        _, _, device, _, place, *_ = about.split(" ")
        kind, source, *_ = behind.split(" ")
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place)
        if len(place) >= len(best[0]) and folder.is_relative_to(place):
            # btrfs and others have a number of their own, and name the disk as their source
            best = (place, kind, [system / "sys/dev/block" / device, system / "sys/class/block" / Path(source).name])
    return best


def _rotates(blocks: list[Path]) -> bool:
    """Whether a disk says that it rotates. What a virtual one says means nothing: it does not know its host's disk. One that
    cannot be seen (behind overlay or zfs) is taken for one that does not."""
    for block in blocks:
        # a partition's queue is that of its disk
        for queue in (block / "queue/rotational", block / "../queue/rotational"):
            try:
                return queue.read_text().strip() == "1" and not re.match(r"(vd|xvd|nbd|zram|loop)", block.resolve().name)
            except OSError:
                continue
    return False
