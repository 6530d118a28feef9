"""SHA-256 of tensors: whether a network is still what it was."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def tensor_digests(network: nn.Module) -> dict[str, str]:
    """The digest of each parameter and buffer by name, of those left out of state dicts too."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {name: sha256(tensor) for name, tensor in tensors}


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's numbers, in hexadecimal digits."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).hexdigest()


def digest(digests: dict[str, str]) -> str:
    """One hash of the digests of all tensors, 16 hexadecimal digits."""
    lines = '\n'.join(f'{name} {each}' for name, each in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
