"""The feature cache: numpy and Zarr; no torch, no task, no model.

import store
cache = store.open("cache/caches/<fingerprint>")    # all checks
cache.rows(0)                                       # (rows of example 0, S, D) float32
"""

from store.errors import Damaged, Refused
from store.reader import Cache, open

__all__ = ["Cache", "Damaged", "Refused", "open"]
