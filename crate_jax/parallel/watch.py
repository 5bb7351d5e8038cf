"""Notices that another process of the job is gone, and ends this one with a line that names the other.

Each process has a connection to process 0, beside the connections of JAX. If a connection breaks or stays silent for
SILENCE seconds, all other processes name its process and end with status LOST. JAX alone would end them too, but after
a longer time and without a line that a person can read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from typing import NoReturn

import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

LOST = 75  # exit status (EX_TEMPFAIL): another process is gone; the same command continues the job
BEAT = 5.0  # seconds between signs of life
SILENCE = 30.0  # seconds without a sign of life, after which a process counts as gone
BYE, ALIVE, GONE = b"b", b".", b"g"  # messages between processes; GONE_FORMAT follows GONE
GONE_FORMAT = struct.Struct(">IB")  # the number of the process that is gone, its status


class Watch:
    """A thread that ends this process when another one is gone, with a line that names the other.

    Process 0 listens; every other process connects to it and sends its number. Each process sends ALIVE every BEAT
    seconds, BYE before it ends regularly, and GONE when it failed. Process 0 tells all others which one failed or is
    lost.

    Args:
      process: this process's number.
      processes: the number of processes; each of them must make a watch.
      address: HOST:PORT of process 0, of which only HOST is used; empty: process 0 sends its address to the others.
    """

    def __init__(self, process: int, processes: int, address: str) -> None:
        self._me = process
        names = f"{socket.gethostname()}, pid {os.getpid()}".encode()[:128].ljust(128, b"\0")
        everyone = np.asarray(multihost_utils.process_allgather(np.frombuffer(names, np.uint8)), np.uint8)
        self._names = [bytes(name).rstrip(b"\0").decode(errors="ignore") for name in everyone]
        if self._me == 0:
            for i, name in enumerate(self._names):
                log.info("process %d of %d: %s", i, processes, name)
        self._ended = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        listener = socket.create_server(("", 0), family=socket.AF_INET, backlog=processes) if self._me == 0 else None
        port = int(multihost_utils.broadcast_one_to_all(np.int32(listener.getsockname()[1] if listener else 0)))
        host = address.rpartition(":")[0].strip("[]") or self._host_of_first()
        try:
            if listener is not None:
                with listener:
                    self._accept(listener, processes)
            else:
                self._peers[0] = socket.create_connection((host, port), timeout=SILENCE)
                self._peers[0].sendall(self._me.to_bytes(4, "big"))
        except OSError as e:
            log.warning(
                "process %d: cannot watch the other processes (%s); JAX notices later that one is gone", self._me, e
            )
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _host_of_first(self) -> str:
        """The address of process 0, for a cluster that only the TPU's metadata describe."""
        own = "0.0.0.0"  # nobody can connect to this address, which then gives the warning
        if self._me == 0:
            with contextlib.suppress(OSError):
                own = socket.gethostbyname(socket.gethostname())
        sent = multihost_utils.broadcast_one_to_all(np.frombuffer(socket.inet_aton(own), np.uint8))
        return socket.inet_ntoa(bytes(np.asarray(sent, np.uint8)))

    def _accept(self, listener: socket.socket, processes: int) -> None:
        deadline = time.monotonic() + SILENCE / 2  # well before a connected process counts as gone
        while len(self._peers) < processes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            peer = listener.accept()[0]
            peer.settimeout(SILENCE)
            process = int.from_bytes(_receive(peer, 4), "big")
            if 0 < process < processes and process not in self._peers:
                self._peers[process] = peer
            else:  # a stray connection
                peer.close()

    def end(self) -> None:
        """Ends the watch in this process."""
        self._ended.set()

    def tell(self, message: bytes, but: int = -1) -> None:
        """Sends `message` to all processes that this one is connected to, except to the process `but`."""
        for process, peer in self._peers.items():
            if process != but:
                _send(peer, message)

    def tell_failure(self, status: int) -> None:
        """Tells the others that this process failed with `status`, which ends them too."""
        self.tell(GONE + GONE_FORMAT.pack(self._me, status))

    def _run(self) -> None:
        heard = dict.fromkeys(self._peers, time.monotonic())
        open_ones = dict(self._peers)
        next_beat = time.monotonic()
        while open_ones and not self._ended.is_set():
            if time.monotonic() >= next_beat:
                self.tell(ALIVE)
                next_beat = time.monotonic() + BEAT
            ready = select.select(list(open_ones.values()), [], [], max(0.0, next_beat - time.monotonic()))[0]
            for process, peer in list(open_ones.items()):
                if peer in ready:
                    got = _receive(peer, 1)
                    if got == BYE:
                        del open_ones[process]
                        continue
                    if got == GONE:
                        detail = _receive(peer, GONE_FORMAT.size)
                        self._end_after(*(GONE_FORMAT.unpack(detail) if detail else (process, LOST)))
                    if not got:
                        self._end_after(process, LOST)
                    heard[process] = time.monotonic()
                elif time.monotonic() - heard[process] > SILENCE:
                    self._end_after(process, LOST)

    def _end_after(self, process: int, status: int) -> None:
        """Ends this process with the status of the process that is gone, so that a launcher treats all alike."""
        if self._ended.is_set():
            return
        if self._me == 0:
            self.tell(GONE + GONE_FORMAT.pack(process, status), but=process)
        gone = f"process {process} of {len(self._names)} ({self._names[process]})"
        if status == LOST:
            die(
                f"{gone} is gone; read its last lines. Process {self._me} stops; the same command in all processes "
                "continues from the last checkpoint", LOST,
            )  # fmt: skip
        die(f"{gone} failed with status {status}; read its last lines. Process {self._me} stops", status)


def _receive(peer: socket.socket, size: int) -> bytes:
    """Receives `size` bytes; returns no bytes if the connection ended before."""
    got = b""
    while len(got) < size:
        try:
            more = peer.recv(size - len(got))
        except OSError:
            return b""
        if not more:
            return b""
        got += more
    return got


def _send(peer: socket.socket, data: bytes) -> None:
    try:
        peer.sendall(data)
    except OSError:
        pass  # the thread that reads from it notices the end


def die(line: str, status: int) -> NoReturn:
    """Prints one line and ends this process at once, whatever its other threads wait for."""
    with contextlib.suppress(OSError):  # the log's disk is full
        os.write(2, f"error: {line}\n".encode())
    os._exit(status)
