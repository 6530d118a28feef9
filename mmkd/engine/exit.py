"""How a program ends: with a message, or at once."""

import logging
import os
import sys
from typing import NoReturn

import torch


def stop(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f'error: {message}')


def leave() -> None:
    """Ends a process of a distributed run that has done its work, at once.

    At the interpreter's own end the threads of a process group, destroyed before or not, can
    outlive what they use: now and then a run that had saved everything aborted, and was called
    failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
