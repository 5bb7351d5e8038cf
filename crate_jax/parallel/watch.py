"""Notices that another process of the job is gone, and ends this one with a line that names the other.

Each process has a connection to process 0, beside the connections of JAX. If a connection breaks or stays silent for
SILENCE seconds, all other processes name its process and end with status LOST. JAX alone would end them too, but after
a longer time, with status 134 and without a line that a person can read.

Process 0 takes only connections that prove themselves (:mod:`crate_jax.parallel.meeting`), one for each process, and
refuses or closes all others as long as the job runs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from typing import NoReturn

from crate_jax.errors import escaped
from crate_jax.parallel import meeting
from crate_jax.parallel.meeting import Answer, Hello

log = logging.getLogger(__name__)

LOST = 75  # exit status (EX_TEMPFAIL): another process is gone; the same command continues the job
BEAT = 5.0  # seconds between signs of life
SILENCE = 30.0  # seconds without a sign of life, after which a process counts as gone
SEND_SECONDS = 1.0  # that a message of a few bytes may take
MAX_STRANGERS = 64  # connections that have not proved themselves yet; one more closes the oldest
BYE, ALIVE, GONE = b"b", b".", b"g"  # messages between processes; GONE_FORMAT follows GONE
GONE_FORMAT = struct.Struct(">IB128s")  # the process that is gone, its status, its name


class Peer:
    """A connection to a process of the job; `heard` is the time of its last sign of life."""

    def __init__(self, process: int, name: str, connection: socket.socket) -> None:
        self.process, self.name, self.connection = process, name, connection
        self.hello: Hello | None = None  # that waits for its answer
        self.received = b""
        self.heard = time.monotonic()


class Stranger:
    """A connection that has not proved itself yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.challenge = secrets.token_bytes(32)
        self.received = b""
        self.deadline = time.monotonic() + meeting.HELLO_SECONDS


class BrokenError(Exception):
    """A process sends what no process of the job sends."""


def take_message(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Takes the first message off the bytes that were received.

    Returns:
      the message's kind, empty if it is not complete yet; its detail; the rest of the bytes.

    Raises:
      BrokenError: the bytes begin with no message.
    """
    kind = data[:1]
    if kind in (BYE, ALIVE):
        return kind, b"", data[1:]
    if kind not in (GONE, b""):
        raise BrokenError
    end = 1 + GONE_FORMAT.size
    return (kind, data[1:end], data[end:]) if len(data) >= end else (b"", b"", data)


class Watch:
    """A thread that ends this process when another one is gone, with a line that names the other.

    Process 0 listens; every other process has a connection to it. Each process sends ALIVE every BEAT seconds, BYE
    before it ends regularly, and GONE when it failed. Process 0 tells all others which one failed or is lost.

    Args:
      process: this process's number.
      processes: the number of processes; each of them must make a watch.
      token: the job's token.
      listener: in process 0, where the others connect.
      port: in process 0, the port of JAX's service, which the others are told when all have come.
      patience: in process 0, seconds after which the job begins without those that have not come.
      first: in the others, the connection to process 0 and its name.

    Attributes:
      met: set when all processes have come.
    """

    def __init__(
        self,
        process: int,
        processes: int,
        token: bytes,
        listener: socket.socket | None = None,
        port: int = 0,
        patience: float = math.inf,
        first: tuple[socket.socket, str] | None = None,
    ) -> None:
        self._me, self._processes, self._token, self._port = process, processes, token, port
        self._name = meeting.own_name()
        self._listener = listener
        self._strangers: list[Stranger] = []
        self._peers: dict[int, Peer] = {}
        self._told = False
        self._closing = time.monotonic() + patience
        self._ended = threading.Event()
        self.met = threading.Event()
        self._selector = selectors.DefaultSelector()
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)
        if first is not None:
            self._add(Peer(0, first[1], first[0]))
            self.met.set()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def missing(self) -> list[int]:
        """In process 0, the processes that have not come."""
        return [i for i in range(1, self._processes) if i not in self._peers]

    def end(self) -> None:
        """Ends the watch in this process."""
        self._ended.set()

    def tell(self, message: bytes, but: int = -1) -> None:
        """Sends `message` to all processes that this one is connected to, except to the process `but`."""
        for process, peer in list(self._peers.items()):
            if process != but:
                _send(peer.connection, message)

    def tell_failure(self, status: int) -> None:
        """Tells the others that this process failed with `status`, which ends them too."""
        self.tell(GONE + GONE_FORMAT.pack(self._me, status, meeting.pack_name(self._name)))

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as e:  # without a watch, a process that is gone would be waited for
            if not self._ended.is_set():
                die(
                    f"process {self._me} of {self._processes} cannot watch the others any more "
                    f"({type(e).__name__}: {e}) and stops; the same command in all processes continues from the last "
                    "checkpoint", LOST,
                )  # fmt: skip

    def _watch(self) -> None:
        next_beat = looked = time.monotonic()
        while not self._ended.is_set() and (self._listener is not None or self._peers):
            if time.monotonic() >= next_beat:
                if self.met.is_set():
                    self.tell(ALIVE)
                next_beat = time.monotonic() + BEAT
            until = min([next_beat, *(s.deadline for s in self._strangers)])
            ready = self._selector.select(max(0.0, until - time.monotonic()))
            for key, _ in ready:
                if key.data is None:
                    self._accept()
                elif isinstance(key.data, Stranger):
                    self._hear_stranger(key.data)
                elif key.data in self._peers.values():
                    self._hear(key.data)
            now = time.monotonic()
            if now - looked > 2 * BEAT:  # this process itself stood still, so it could not hear the others
                for peer in self._peers.values():
                    peer.heard = now
            looked = now
            self._look_at_clock(now)
        if self._listener is not None:
            self._listener.close()
        for stranger in self._strangers:
            stranger.connection.close()
        self._selector.close()

    def _look_at_clock(self, now: float) -> None:
        for stranger in list(self._strangers):
            if now > stranger.deadline:
                self._send_away(stranger, "said nothing")
        if now > self._closing and not self.met.is_set():
            missing = ", ".join(map(str, self.missing()))
            log.warning("cannot watch the processes %s; JAX notices later that one is gone", missing)
            self._close_meeting()
        if self.met.is_set():
            for peer in list(self._peers.values()):
                if now - peer.heard > SILENCE:
                    self._end_after(peer.process, LOST, peer.name, silent=True)

    def _add(self, peer: Peer) -> None:
        peer.connection.settimeout(SEND_SECONDS)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._peers[peer.process] = peer

    def _remove(self, peer: Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.process]

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection = self._listener.accept()[0]
        except BlockingIOError:
            return
        except OSError as e:  # too many open files, most likely
            self._tell_once(f"a connection to it was not taken ({e.strerror})")
            time.sleep(0.1)  # the kernel would report the connection again at once
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self._send_away(self._strangers[0], "there were too many")
        connection.settimeout(SEND_SECONDS)
        stranger = Stranger(connection)
        self._strangers.append(stranger)
        self._selector.register(connection, selectors.EVENT_READ, stranger)
        _send(connection, meeting.CHALLENGE.pack(meeting.MAGIC, stranger.challenge))

    def _hear_stranger(self, stranger: Stranger) -> None:
        if stranger not in self._strangers:  # sent away since it was found ready
            return
        more = _receive(stranger.connection, meeting.HELLO.size - len(stranger.received))
        stranger.received += more
        if not more:
            self._send_away(stranger, "left at once")
        elif len(stranger.received) == meeting.HELLO.size:
            hello, right = meeting.unpack_hello(stranger.received, stranger.challenge, self._token)
            if hello is None:
                self._send_away(stranger, "spoke another language")
            else:
                self._judge(stranger, hello, right)

    def _judge(self, stranger: Stranger, hello: Hello, right: bool) -> None:
        """Lets a process in that proved itself and whose place is free; answers why not to another one."""
        there = {process: peer.name for process, peer in self._peers.items()} | {0: self._name}
        if not right:
            self._send_away(stranger, f"has another token ({hello.name})", hello, Answer(meeting.TOKEN, 0, ""))
        elif hello.processes != self._processes or hello.process >= self._processes:
            count = Answer(meeting.COUNT, min(self._processes, 65535), "")
            self._send_away(stranger, f"is one of {hello.processes} processes ({hello.name})", hello, count)
        elif hello.process in there or self.met.is_set():
            why = f"says that it is process {hello.process} too ({hello.name})"
            holder = there.get(hello.process, "it has ended")
            self._send_away(stranger, why, hello, Answer(meeting.TAKEN, 0, holder))
        else:
            self._leave_strangers(stranger)
            peer = Peer(hello.process, hello.name, stranger.connection)
            peer.hello = hello
            self._add(peer)
            if not self.missing():
                self._close_meeting()

    def _close_meeting(self) -> None:
        """Tells all who have come that the job begins; nobody else is let in from now on."""
        for process, peer in sorted({**self._peers, 0: None}.items()):
            log.info("process %d of %d: %s", process, self._processes, escaped(peer.name if peer else self._name))
            if peer is not None and peer.hello is not None:
                welcome = Answer(meeting.WELCOME, self._port, self._name)
                _send(peer.connection, meeting.pack_answer(welcome, peer.hello, self._token))
                peer.hello, peer.heard = None, time.monotonic()
        self.met.set()

    def _leave_strangers(self, stranger: Stranger) -> None:
        self._strangers.remove(stranger)
        self._selector.unregister(stranger.connection)

    def _send_away(
        self, stranger: Stranger, why: str, hello: Hello | None = None, answer: Answer | None = None
    ) -> None:
        self._leave_strangers(stranger)
        with contextlib.suppress(OSError):
            host = stranger.connection.getpeername()[0]
            self._tell_once(f"a connection from {host} was closed: it {why}")
        if hello is not None and answer is not None:
            _send(stranger.connection, meeting.pack_answer(answer, hello, self._token))
        stranger.connection.close()

    def _tell_once(self, what: str) -> None:
        if not self._told:
            self._told = True
            log.warning("the port where the processes meet: %s; what else comes is not logged", escaped(what))

    def _hear(self, peer: Peer) -> None:
        more = _receive(peer.connection, 4096)
        if not more and not self.met.is_set():  # its place is free again
            self._remove(peer)
            peer.connection.close()
            return
        if not more:
            self._end_after(peer.process, LOST, peer.name)
        peer.heard = time.monotonic()
        peer.received += more
        try:
            while self._obey(peer):
                pass
        except BrokenError:
            self._end_after(peer.process, LOST, peer.name)

    def _obey(self, peer: Peer) -> bool:
        """Takes and obeys a message; returns whether there may be another one."""
        kind, detail, peer.received = take_message(peer.received)
        if kind == GONE:
            process, status, name = GONE_FORMAT.unpack(detail)
            # Only process 0 hears of others; a job that was stopped has not ended well.
            if (self._me == 0 and process != peer.process) or process >= self._processes or status == 0:
                raise BrokenError
            self._end_after(process, status, meeting.unpack_name(name))
        if kind == BYE:
            self._remove(peer)
        return kind == ALIVE

    def _end_after(self, process: int, status: int, name: str, silent: bool = False) -> None:
        """Ends this process with the status of the process that is gone, so that a launcher treats all alike."""
        if self._ended.is_set():
            return
        if self._me == 0:
            self.tell(GONE + GONE_FORMAT.pack(process, status, meeting.pack_name(name)), but=process)
        who = f"process {process} of {self._processes} ({name})"
        if status == LOST:
            gone = f"has been silent for {SILENCE:.0f} s: it is stopped or hangs" if silent else "is gone"
            die(
                f"{who} {gone}; read its last lines. Process {self._me} stops; the same command in all processes "
                "continues from the last checkpoint", LOST,
            )  # fmt: skip
        die(f"{who} failed with status {status}; read its last lines. Process {self._me} stops", status)


def _receive(connection: socket.socket, size: int) -> bytes:
    """What has come, at most `size` bytes; no bytes if the connection has ended."""
    try:
        return connection.recv(size)
    except OSError:
        return b""


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        pass  # the thread that reads from it notices the end


def die(line: str, status: int) -> NoReturn:
    """Prints one line and ends this process at once, whatever its other threads wait for."""
    with contextlib.suppress(OSError):  # the log's disk is full
        os.write(2, f"error: {escaped(line)}\n".encode())
    os._exit(status)
