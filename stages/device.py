"""Which device computes."""

import torch

from store.errors import Refused


def pick(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises Refused for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"device {name!r} is not here ({str(error).splitlines()[0]}); give auto, cpu, or a GPU that is") from None
    return device
