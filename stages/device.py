"""Which device computes."""

import platform

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


def signature(device: torch.device) -> str:
    """What fixes the last bits of a forward pass beside the model: the device and how it is used."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)} torch {torch.__version__}"
    how = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device.type} {platform.machine()} {how} torch {torch.__version__}"
