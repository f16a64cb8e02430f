"""Runs `robustfeat ARGUMENTS` as on a system without POSIX, as far as Linux can imitate one.

    python tests/without_posix.py ARGUMENTS...

Modules and functions that Windows lacks are taken away after the standard library's own modules have loaded: on Windows
these take other ways.
"""

import asyncio
import concurrent.futures.thread
import ctypes
import getpass
import logging.handlers
import multiprocessing.connection
import multiprocessing.synchronize
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any, NoReturn

MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "uvloop")
FUNCTIONS = """
    fork forkpty register_at_fork killpg getpgid setsid nice getuid geteuid getgid getegid
    sched_getaffinity sched_setaffinity sched_yield memfd_create posix_fallocate posix_fadvise posix_spawn pread pwrite
    preadv pwritev sendfile set_blocking get_blocking statvfs mkfifo fchmod fchown chown getloadavg
    O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC
""".split()  # noqa: SIM905 - one a line would be forty lines
SIGNALS = ("SIGKILL", "SIGCHLD", "SIGHUP", "SIGALRM", "SIGUSR1", "pthread_sigmask", "setitimer")


def refuse(*_: Any, **__: Any) -> NoReturn:
    """In place of what Windows has in another form."""
    raise NotImplementedError


def forget() -> None:
    """Takes away what Windows lacks."""
    loaded = (
        concurrent.futures.thread,
        ctypes,
        getpass,
        logging.handlers,
        multiprocessing,
        shutil,
        socket,
        tempfile,
        uuid,
    )
    assert all(loaded)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    asyncio.SelectorEventLoop.add_signal_handler = refuse  # type: ignore[assignment, method-assign]
    asyncio.SelectorEventLoop.subprocess_exec = refuse  # type: ignore[method-assign]
    subprocess.Popen.__init__ = refuse  # type: ignore[method-assign]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    opened = os.open

    def open_file(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *arguments, **options)

    os.open = open_file


if __name__ == "__main__":
    forget()
    from robustfeat.cli import main

    main()
