"""Two ways to end a program: with an error message, and without the interpreter's exit handlers."""

import logging
import os
import sys
from typing import NoReturn

import torch


def stop(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit status 1."""
    raise SystemExit(f'error: {message}')


def leave() -> None:
    """Ends a process of a distributed run at once, with exit status 0; else does nothing.

    In the interpreter's own shutdown the threads of a process group, destroyed or not, can outlive
    the objects they use: now and then a run that had saved everything aborted and counted as
    failed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
