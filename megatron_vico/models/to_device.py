"""From the host's memory to the device without waiting for what the device has still to do."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; one of the host's goes there by way of page-locked memory.

    From other memory CUDA may wait for all that is queued first. torch keeps the page-locked copy
    until it is through, and has it for the next one.
    """
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
