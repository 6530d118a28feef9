"""Ways to end a program: with an error message, and without the interpreter's exit handlers."""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.logging import MMLogger

PACKAGE = Path(__file__).resolve().parents[1]


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


def run(main: Callable[[], Any]) -> NoReturn:
    """Runs a command line to its end; an exception is one line on stderr and exit status 1.

    Modules in the working directory are found too, behind those that are installed: a config's
    ``custom_imports`` names some.
    Its traceback is in the log file of the run, which the line names; before there is one, that of
    a refusal is left out and any other in a temporary file.
    """
    # For processes that are spawned; mmkd/__init__.py has it for this one.
    known = os.environ.get('PYTHONWARNINGS')
    quiet = 'ignore:pkg_resources is deprecated as an API'
    os.environ['PYTHONWARNINGS'] = f'{known},{quiet}' if known else quiet
    if '' not in sys.path and not getattr(sys.flags, 'safe_path', False):
        sys.path.append('')
    try:
        code = main()
    except Exception as error:
        where = _keep_traceback(error)
        stop(in_one_line(error) + (f' (traceback: {where})' if where else ''))
    sys.exit(code)


def in_one_line(error: BaseException) -> str:
    """The message of an error, with its class where it is no refusal of mmkd's."""
    text = str(error).strip()
    if 'Original Traceback' in text:
        # Of a data-loader worker: it holds the worker's traceback, whose last line is the message.
        return text.splitlines()[-1]
    line = ' '.join(part.strip() for part in text.splitlines() if part.strip())
    kind = type(error).__name__
    return line if line and _is_refusal(error) else f'{kind}: {line}' if line else kind


def _is_refusal(error: BaseException) -> bool:
    """Whether mmkd raised an error on purpose."""
    if type(error).__module__.partition('.')[0] == 'mmkd':
        return True
    frames = traceback.extract_tb(error.__traceback__)
    here = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    return here and type(error) in (ValueError, RuntimeError, FileNotFoundError, OSError)


def _keep_traceback(error: BaseException) -> str | None:
    """Writes the traceback of an error to a file and returns its path, if there is one."""
    text = ''.join(traceback.format_exception(error))
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler) and os.path.isfile(handler.baseFilename):
            record = logging.LogRecord('mmengine', logging.ERROR, __file__, 0, text, None, None)
            handler.handle(record)
            return handler.baseFilename
    if _is_refusal(error):
        return None
    with tempfile.NamedTemporaryFile(
        'w', prefix='mmkd-', suffix='.log', delete=False, encoding='utf-8'
    ) as file:
        file.write(text)
    return file.name
