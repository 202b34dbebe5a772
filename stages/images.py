"""Images to pixels to batches, by the model's own image processor. Sole home of image processors."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from stages.sources import Checkpoint
from stages.texts import Table
from store.errors import Refused

Processor = Callable[[list[Image.Image]], torch.Tensor]
"""B images -> (B, channels, height, width) float32"""


class Images(NamedTuple):
    """The images of a split's examples, in the order of the cache."""

    dataset: Any
    """memory-mapped"""
    column: str
    processor: Processor
    source: np.ndarray
    """(N,) int64 the example's row in the data set"""
    tokens: int
    """of every image"""
    keys: np.ndarray
    """(N, 16) uint8"""
    cut: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each example."""
        return np.full(len(self.source), self.tokens)

    def tables(self) -> dict[str, Table]:
        """What a cache keeps of them: a hash of each example's pixels."""
        return {"key": (self.keys, {"meaning": "blake2b-128 of the image's size and RGB pixels"})}

    def collate(self, examples: np.ndarray) -> dict[str, torch.Tensor]:
        """pixel_values (B, channels, height, width) float32."""
        return {"pixel_values": self.processor([_rgb(self.dataset[int(row)][self.column]) for row in self.source[examples]])}


def processor(checkpoint: Checkpoint) -> tuple[Processor, tuple[int, ...]]:
    """The model's own image processor, and the (channels, height, width) that it gives. Raises Refused without one."""
    try:
        # by PIL always: torchvision, where it is installed, gives other pixels for the same files
        loaded = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            checkpoint.path, trust_remote_code=False, local_files_only=True, backend="pil"
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Refused(
            f"backbone {checkpoint.name}: {checkpoint.path} has no image processor that loads ({reason}); save the model's own "
            f"there, as preprocessor_config.json"
        ) from None

    def pixels(images: list[Image.Image]) -> torch.Tensor:
        values = loaded(images, return_tensors="pt")["pixel_values"]
        assert isinstance(values, torch.Tensor)
        return values.float()

    # a wide one and a high one: a processor that keeps proportions would give two sizes
    shapes = {tuple(pixels([Image.new("RGB", size)]).shape[1:]) for size in ((80, 60), (60, 80))}
    if len(shapes) > 1 or len(shape := shapes.pop()) != 3:
        raise Refused(
            f"backbone {checkpoint.name}: its image processor gives pixels of several shapes; set one size in its "
            f"preprocessor_config.json"
        )
    return pixels, shape


def read(dataset: Any, column: str, processor: Processor, rows: np.ndarray, tokens: int, where: str) -> Images:
    """The images of the given rows, each opened once. Raises Refused naming the first row that is no image."""
    keys = np.empty((len(rows), 16), np.uint8)
    for number, row in enumerate(rows):
        try:
            image = _rgb(dataset[int(row)][column])
        except Exception as error:  # a decoder's own errors are many
            raise Refused(f"{where}: row {row} (counted from 0) of column {column!r} is no image that opens ({error})") from None
        text = repr(image.size).encode() + image.tobytes()
        keys[number] = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), np.uint8)
    return Images(dataset, column, processor, rows, tokens, keys)


def _rgb(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("it is empty")
    return image.convert("RGB")
