"""Folders that one process at a time writes to, and files that are there whole or not at all."""
import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import tempfile
import time

import config
from config import UserError
from nanodpo.terminal import printable

HELD = {}                       # {path of a lock: its file}, what this process holds


def hold(folder, say=print):
    """Keep others out of a folder until release(), or until this process ends. UserError where one is in there.

    The lock is a file beside the folder that names its holder. A POSIX lock goes with its process, on NFS, too.
    """
    real = os.path.realpath(folder)
    path = os.path.join(os.path.dirname(real), f'.{os.path.basename(real)}.lock')
    os.makedirs(os.path.dirname(real), exist_ok=True)
    while path not in HELD:
        holder = 'another process'
        try:
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), 'r+', errors='replace')
            holder = printable(file.read(100))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{folder} is in use by {holder}: wait for it, or end it; if it is gone, remove {path}')
        except OSError as error:
            return say(f'note: {folder} cannot be locked ({error}): see that nothing else writes there')
        if os.path.exists(path) and os.path.samefile(file.fileno(), path):  # else its holder has just removed it
            HELD[path] = file
            if holder:
                say(f'note: {holder} did not come to its end in {folder}')
            file.seek(0)
            file.truncate()
            file.write(f'process {os.getpid()} on {socket.gethostname()}')
            file.flush()


@config.AT_END.callback
def release():
    """Let others into all folders that this process holds."""
    while HELD:
        path, file = HELD.popitem()
        with contextlib.suppress(OSError):
            os.remove(path)
        file.close()


@contextlib.contextmanager
def held(folder):
    """Hold a folder. If nothing is in it in the end, it goes, and what above it is empty, too."""
    hold(folder)
    try:
        yield
    finally:
        release()
        with contextlib.suppress(OSError):
            os.removedirs(folder)


@contextlib.contextmanager
def scratch():
    """A temporary folder, locked while its process lives. Those that killed processes have left are removed."""
    with tempfile.TemporaryDirectory(prefix='nanodpo-scratch-') as mine:
        for path in [mine, *glob.glob(os.path.join(tempfile.gettempdir(), 'nanodpo-scratch-*'))]:
            with contextlib.suppress(OSError):          # in use, or another user's
                if path == mine or time.time() - os.path.getmtime(path) > 60:       # a new one may not be locked yet
                    fcntl.flock(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if path != mine:
                        shutil.rmtree(path)
                        print(f'note: removed {path}, which a killed process has left')
        yield mine


def regular(path):
    """The path of a file, or of a link to one. FileNotFoundError for a pipe: it would be waited for, for ever."""
    if os.path.isfile(path):
        return path
    raise FileNotFoundError(errno.ENOENT, 'no plain file', str(path))


@contextlib.contextmanager
def written_aside(path):
    """The name to write to. The file is renamed to `path`, or after an error removed."""
    aside = path + '.tmp'
    if os.path.lexists(aside):
        os.remove(aside)                # a link there would lead the writing elsewhere
    try:
        yield aside
        os.replace(aside, path)
    finally:
        if os.path.lexists(aside):
            os.remove(aside)
