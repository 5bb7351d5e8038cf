"""Notices that another process of the job is gone, and ends this one with a line that names it.

Each process keeps a connection of its own to process 0 beside those of JAX: whoever's connection breaks, or stays
silent for SILENCE seconds, is named by all others, which then leave with the status LOST. JAX alone ends the others
too, but after a longer time, without a line that a person can read.
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
SILENCE = 30.0  # seconds without one, after which a process counts as gone
BYE, ALIVE, GONE = b"b", b".", b"g"  # what processes tell each other; GONE is followed by GONE_FORMAT
GONE_FORMAT = struct.Struct(">IB")  # which process, with what status


class Watch:
    """A thread that ends this process, naming the culprit, when another one is gone.

    Process 0 listens; every other one connects to it and says who it is. All send a byte every BEAT seconds, BYE before
    they leave of their own accord, and GONE when they failed. Process 0 passes on who failed, or was lost.

    Args:
      process: this one's number.
      processes: how many; all must make a watch.
      address: HOST:PORT of process 0, whose host is taken; empty: it tells the others its address.
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
            log.warning("process %d: no watch over the other processes (%s); JAX's own is slower", self._me, e)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def _host_of_first(self) -> str:
        """The address of process 0, where only the TPU's metadata know it."""
        own = "0.0.0.0"  # nobody can connect to it, which is a warning
        if self._me == 0:
            with contextlib.suppress(OSError):
                own = socket.gethostbyname(socket.gethostname())
        told = multihost_utils.broadcast_one_to_all(np.frombuffer(socket.inet_aton(own), np.uint8))
        return socket.inet_ntoa(bytes(np.asarray(told, np.uint8)))

    def _accept(self, listener: socket.socket, processes: int) -> None:
        deadline = time.monotonic() + SILENCE / 2  # well before one that is connected counts as gone
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
        """Stops looking."""
        self._ended.set()

    def tell(self, message: bytes, but: int = -1) -> None:
        """Sends to the processes that this one is connected to, `but` one."""
        for process, peer in self._peers.items():
            if process != but:
                _send(peer, message)

    def tell_failure(self, status: int) -> None:
        """Ends the others, too."""
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
                        told = _receive(peer, GONE_FORMAT.size)
                        self._lost(*(GONE_FORMAT.unpack(told) if told else (process, LOST)))
                    if not got:
                        self._lost(process, LOST)
                    heard[process] = time.monotonic()
                elif time.monotonic() - heard[process] > SILENCE:
                    self._lost(process, LOST)

    def _lost(self, process: int, status: int) -> None:
        """Ends this process with the status of the one that is gone: 2, a mistake, would only come again."""
        if self._ended.is_set():
            return
        if self._me == 0:
            self.tell(GONE + GONE_FORMAT.pack(process, status), but=process)
        gone = f"process {process} of {len(self._names)} ({self._names[process]})"
        if status == LOST:
            die(
                f"{gone} is gone; see its own last lines. Process {self._me} stops; the same command in all processes "
                "continues from the last checkpoint", LOST,
            )  # fmt: skip
        die(f"{gone} failed with status {status}; see its own last lines. Process {self._me} stops", status)


def _receive(peer: socket.socket, size: int) -> bytes:
    """So many bytes, or none at all if the connection ended."""
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
        pass  # its end is noticed by the reader


def die(line: str, status: int) -> NoReturn:
    """One line and out, whatever other threads are waiting for."""
    with contextlib.suppress(OSError):  # the log's disk is full
        os.write(2, f"error: {line}\n".encode())
    os._exit(status)
