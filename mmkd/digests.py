"""SHA-256 of tensors, which tells whether a network is still what it was, and of texts."""

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
    return short_sha256(lines)


def short_sha256(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
