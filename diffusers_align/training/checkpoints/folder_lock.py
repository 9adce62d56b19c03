"""One run per folder: a lock that the operating system holds for a process, and lets go of when the process dies, however it dies.

The lock is POSIX's (`fcntl.lockf`) on the file `.lock`, which says who holds it; it is the process's own, so no child that outlives the process
keeps it. A file that is left behind by a kill locks nothing. On network file systems it works across machines where the server supports it: NFS
version 4 does, Lustre only when mounted with `-o flock`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

NAME = ".lock"


class FolderLock:
    """The lock of `folder`, held until `release`, or until the object or the process is gone.

    A later run of the same process takes it over: in a notebook, a run that failed may still be referred to by its traceback.

    Raises:
        OSError: another process holds it; the message says which.

    Attributes:
        warning: why the folder is not locked, if this system or its file system knows no such locks; None otherwise.
    """

    _of_this_process: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()
    _descriptor: int | None = None

    def __init__(self, folder: Path, command: str = ""):
        self.folder, self.warning, self._process = Path(folder).resolve(), None, os.getpid()
        self.file = self.folder / NAME
        if (held := self._of_this_process.get(self.folder)) is not None:
            self._descriptor, held._descriptor = held._descriptor, None
            self._of_this_process[self.folder] = self
        elif fcntl is None:
            self.warning = "This system has no file locks: see to it yourself that no other run writes to the output folder."
        else:
            self._acquire(command)

    def _acquire(self, command: str) -> None:
        while self._descriptor is None and self.warning is None:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(descriptor)
                raise OSError(f"Another run writes to {self.folder}: {self._holder()}. Wait for it, stop it, or choose another --output_dir.") from None
            except OSError as error:
                os.close(descriptor)
                self.warning = f"{self.folder} cannot be locked ({error.strerror}): see to it yourself that no other run writes to it."
                return
            if self._is_file(descriptor):
                self._descriptor = descriptor
            else:  # its holder removed it between opening and locking
                os.close(descriptor)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command or sys.argv[0]}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(about) + "\n").encode(), 0)
        self._of_this_process[self.folder] = self

    def _is_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            about = json.loads(self.file.read_text())
            return f"process {about['pid']} on {about['host']} since {about['started']} ({about['command']})"
        except (OSError, ValueError, KeyError):
            return "a process that has not said who it is"

    def release(self) -> None:
        """Let go of the folder, if this object holds it, and remove the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None and os.getpid() == self._process:  # a fork's copy holds nothing
            self._of_this_process.pop(self.folder, None)
            if self._is_file(descriptor):
                self.file.unlink()  # before the lock is let go, so that nobody's is removed
            os.close(descriptor)

    def __del__(self):
        self.release()
