"""Folders that one process at a time writes to, and files that are there whole or not at all."""
import contextlib
import fcntl
import os
import socket

import config
from config import UserError

HELD = {}                       # {path of a lock: its file}, what this process holds


def hold(folder, say=print):
    """Keep other processes out of a folder until release(), or until this one ends. UserError if one is in there.

    The lock is a file beside the folder that names its holder. A POSIX lock goes with its process, on NFS, too.
    """
    real = os.path.realpath(folder)
    path = os.path.join(os.path.dirname(real), f'.{os.path.basename(real)}.lock')
    os.makedirs(os.path.dirname(real), exist_ok=True)
    if path in HELD:
        return
    while path not in HELD:
        holder = 'another process'
        try:
            file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), 'r+', errors='replace')
            holder = file.read()
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'{folder} is in use by {holder}: wait for it, or end it; if it is gone, remove {path}')
        except OSError as error:
            return say(f'note: {folder} cannot be locked ({error.strerror}): see that nothing else writes there')
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            HELD[path] = file       # else its holder has just removed it: the next try makes a new one
    if holder:
        say(f'note: {holder} did not come to its end in {folder}')
    file.seek(0)
    file.truncate()
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()


def release():
    """Let others into all folders that this process holds."""
    while HELD:
        path, file = HELD.popitem()
        with contextlib.suppress(OSError):
            os.remove(path)
        file.close()


config.AT_END.append(release)


@contextlib.contextmanager
def held(folder):
    hold(folder)
    try:
        yield
    finally:
        release()


@contextlib.contextmanager
def written_aside(path):
    """The name to write to. The file is renamed to `path`, or after an error removed."""
    aside = path + '.tmp'
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.remove(aside)            # a link there would lead the writing elsewhere
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.remove(aside)
