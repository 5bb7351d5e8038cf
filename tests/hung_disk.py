"""A file system of read-only files whose server can stop answering, as a network disk does; needs root and FUSE."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR = 1, 2, 3, 14, 15, 18, 26, 27, 28, 29
WITHOUT_REPLY = (FORGET, 36, 42)  # also INTERRUPT and BATCH_FORGET
DIRECT_IO = 1  # the kernel keeps no copy of what was read


class HungDisk:
    """Mounts `files`, name to contents, at `folder` while its context is open.

    From `hang()` on no request is answered; they wait in the kernel, where SIGKILL still ends who asks.

    Raises:
      OSError: FUSE cannot be used here.
    """

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self._folder, self._names, self._files = folder, list(files), list(files.values())
        self._end = threading.Event()
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if ctypes.CDLL(None, use_errno=True).mount(b"crate", os.fsencode(folder), b"fuse", 0, options):
            os.close(self._fuse)
            raise OSError(ctypes.get_errno(), "cannot mount")
        self._thread = threading.Thread(target=self._serve, name="hung_disk", daemon=True)
        self._thread.start()

    def __enter__(self) -> HungDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang()
        os.close(self._fuse)  # what still waits gets an error
        subprocess.run(["umount", "-l", self._folder], check=False)

    def hang(self) -> None:
        """Answers nothing any more."""
        self._end.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._end.is_set():
            if not select.select([self._fuse], [], [], 0.02)[0]:
                continue
            request = os.read(self._fuse, 1 << 20)
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            if code in WITHOUT_REPLY:
                continue
            body = self._answer(code, node, request[40:])
            error, body = (0, body) if body is not None else (-errno.ENOENT if code == LOOKUP else -errno.ENOSYS, b"")
            os.write(self._fuse, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    def _answer(self, code: int, node: int, body: bytes) -> bytes | None:
        """The reply's body; None: an error. Node 1 is the folder, node 2 + i is file i."""
        if code == INIT:
            return struct.pack("<IIIIHHIIHHIIH", 7, 31, 0, 0, 16, 12, 1 << 16, 1, 0, 0, 0, 0, 0).ljust(64, b"\0")
        if code == LOOKUP and (name := os.fsdecode(body.rstrip(b"\0"))) in self._names:
            node = 2 + self._names.index(name)
            return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)
        if code == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if code in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, DIRECT_IO, 0)
        if code == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self._files[node - 2][offset : offset + size]
        if code == READDIR:
            _, offset, size = struct.unpack_from("<QQI", body)
            listed = b""
            for i, name in list(enumerate(map(os.fsencode, self._names)))[offset:]:
                entry = struct.pack("<QQII", 2 + i, i + 1, len(name), stat.S_IFREG >> 12) + name
                entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
                if len(listed) + len(entry) > size:
                    break
                listed += entry
            return listed
        # Without FLUSH, since the kernel lets nobody die who waits for its answer.
        return b"" if code in (RELEASE, RELEASEDIR) else None

    def _attributes(self, node: int) -> bytes:
        size, mode = (0, stat.S_IFDIR | 0o755) if node == 1 else (len(self._files[node - 2]), stat.S_IFREG | 0o444)
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
