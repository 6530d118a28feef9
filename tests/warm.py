"""A Python that has imported the stack already, for tests of command lines.

A cold interpreter takes some five seconds to import PyTorch and MMDetection. ``python()`` is the
path of a stand-in for ``sys.executable``: it hands its arguments, environment, folder and open
files to a server, which has imported the stack and has made it quick, forks, and runs in the fork
what Python would run. Exit status, output and signals are those of the fork. A few tests
start a cold interpreter all the same, so that it is known to work.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@functools.cache
def python() -> str:
    """The path of the stand-in; its server runs until this process ends."""
    folder = tempfile.mkdtemp(prefix='mmkd-warm-')
    stand_in = Path(folder, 'python')
    command = f'exec {sys.executable} -ISs {Path(__file__).resolve()}'
    stand_in.write_text(f'#!/bin/sh\n{command} run {folder}/socket "$@"\n')
    stand_in.chmod(0o755)
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    # Its input is this process's life.
    server = subprocess.Popen(
        [sys.executable, __file__, 'serve', f'{folder}/socket'], env=env, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    if b'ready\n' not in server.stdout:  # reads on until it is there, or to the end
        raise RuntimeError(f'{__file__} could not import the stack')

    def end() -> None:
        server.stdin.close()
        server.wait()
        for path in Path(folder).iterdir():
            path.unlink()
        os.rmdir(folder)

    atexit.register(end)
    return str(stand_in)


# --- the stand-in ---------------------------------------------------------------------------------


def run(address: str, arguments: list[str]) -> None:
    """Has the server run it; ends as that ends."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    asked = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [len(asked).to_bytes(4, 'big')], [0, 1, 2])
    server.sendall(asked)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
    status = int.from_bytes(server.recv(4), 'big', signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (9, 19) else None
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- the server -----------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Forks for whoever connects; returns in the fork, to run there what was asked for."""
    import mmdet.apis  # noqa: F401
    import mmdet.utils
    import quick
    import torch.distributed.run  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import mmkd.analysis.comparison  # noqa: F401

    mmdet.utils.register_all_modules(init_default_scope=False)
    quick.make_quick()
    gc.collect()
    gc.freeze()  # or else the end of each fork looks through all of it, which takes seconds
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    os.write(1, b'ready\n')
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    while True:
        readable, _, _ = select.select([0, listener, ended, *children.values()], [], [])
        for pid, client in list(children.items()):
            if client in readable:
                told = client.recv(16)
                with contextlib.suppress(ProcessLookupError):
                    for number in told or [signal.SIGKILL]:  # the stand-in itself was killed
                        os.kill(pid, number)
                if not told:
                    del children[pid]
                    client.close()
        if ended in readable:
            os.read(ended, 1024)
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                if client := children.pop(pid, None):
                    code = os.waitstatus_to_exitcode(status)
                    with contextlib.suppress(OSError):
                        client.sendall(code.to_bytes(4, 'big', signed=True))
                    client.close()
        if listener in readable:
            client = listener.accept()[0]
            size, files, _, _ = socket.recv_fds(client, 4, 3)
            asked = b''
            while len(asked) < int.from_bytes(size, 'big'):
                asked += client.recv(1 << 20)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (client, listener, *children.values()):
                    other.close()
                os.close(ended), os.close(wake)
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                become(*json.loads(asked))
                return
            for file in files:
                os.close(file)
            children[pid] = client
        if 0 in readable:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)


def become(arguments: list[str], env: dict[str, str], folder: str) -> None:
    """Run as ``python ARGUMENTS`` in this folder and environment."""
    import runpy

    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get('OMP_NUM_THREADS', '1')))
    if arguments[0] == '-u':
        del arguments[0]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    how, *rest = arguments
    paths = [path for path in env.get('PYTHONPATH', '').split(':') if path]
    own = {str(ROOT), str(ROOT / 'tests')}
    sys.path[:] = paths + [path for path in sys.path if path not in own]
    sys.path.insert(0, os.getcwd() if how in ('-c', '-m') else str(Path(how).resolve().parent))
    if how == '-c':
        sys.argv = ['-c', *rest[1:]]
        exec(rest[0], {'__name__': '__main__', '__builtins__': __builtins__})
    elif how == '-m':
        sys.argv = rest
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(how, run_name='__main__')


if __name__ == '__main__':
    what, address, *arguments = sys.argv[1:]
    if what == 'run':
        run(address, arguments)
    else:
        serve(address)
