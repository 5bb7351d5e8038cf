"""How the processes of a job meet at one port, and prove to each other that they belong together.

Process 0 listens and sends a challenge to whoever connects. A process answers with its number and a proof: the
HMAC-SHA256 (RFC 2104) of the challenge and of all that it says, under a token that only the job's processes know.
Process 0 answers in the same way. All messages have fixed sizes and no message is obeyed before its proof is compared.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
import struct
import time
from typing import NamedTuple

MAGIC = b"cratejx1"
CHALLENGE = struct.Struct(">8s32s")  # MAGIC, a nonce
HELLO = struct.Struct(">8s32sII128s32s")  # MAGIC, a nonce, the process, the number of processes, its name, a proof
ANSWER = struct.Struct(">cH128s32s")  # the verdict, the port of JAX's service, a process's name, a proof
PROOF_BYTES = 32
WELCOME, TAKEN, COUNT, TOKEN = b"w", b"t", b"c", b"k"  # verdicts
HELLO_SECONDS = 10.0  # within which a connection must have proved itself
RETRY_SECONDS = 0.3  # between two attempts to reach process 0


class Hello(NamedTuple):
    """What a process says of itself: its nonce, its number, the number of processes, and its name for people."""

    nonce: bytes
    process: int
    processes: int
    name: str


class Answer(NamedTuple):
    """What process 0 answers.

    Attributes:
      verdict: WELCOME, TAKEN, COUNT or TOKEN.
      port: the port of JAX's service after WELCOME; the number of processes after COUNT; otherwise 0.
      name: the name of process 0 after WELCOME; the name of the process in this place after TAKEN; otherwise empty.
    """

    verdict: bytes
    port: int
    name: str


class RefusedError(Exception):
    """Process 0 of a run does not let this process in."""


def own_name() -> str:
    """This process's name for people: host and process id."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


def pack_name(name: str) -> bytes:
    """A name as 128 bytes, cut or filled with zeros."""
    return name.encode()[:128].ljust(128, b"\0")


def unpack_name(data: bytes) -> str:
    """The name in 128 bytes of :func:`pack_name`."""
    return data.rstrip(b"\0").decode(errors="replace")


def _proof(token: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"".join(parts), "sha256")  # all parts have fixed sizes


def pack_hello(hello: Hello, challenge: bytes, token: bytes) -> bytes:
    """The bytes of a hello, with the proof for this nonce of a challenge."""
    body = HELLO.pack(MAGIC, *hello[:3], pack_name(hello.name), b"")[:-PROOF_BYTES]
    return body + _proof(token, challenge, body)


def unpack_hello(data: bytes, challenge: bytes, token: bytes) -> tuple[Hello | None, bool]:
    """Reads HELLO.size bytes.

    Returns:
      the hello, None if the bytes are none; whether its proof is right.
    """
    magic, nonce, process, processes, name, proof = HELLO.unpack(data)
    if magic != MAGIC:
        return None, False
    right = hmac.compare_digest(proof, _proof(token, challenge, data[:-PROOF_BYTES]))
    return Hello(nonce, process, processes, unpack_name(name)), right


def pack_answer(answer: Answer, hello: Hello, token: bytes) -> bytes:
    """The bytes of an answer to `hello`, with a proof."""
    body = ANSWER.pack(answer.verdict, answer.port, pack_name(answer.name), b"")[:-PROOF_BYTES]
    return body + _proof(token, hello.nonce, body)


def unpack_answer(data: bytes, nonce: bytes, token: bytes) -> tuple[Answer, bool]:
    """Reads ANSWER.size bytes: the answer to the hello with this nonce, and whether its proof is right."""
    verdict, port, name, proof = ANSWER.unpack(data)
    right = hmac.compare_digest(proof, _proof(token, nonce, data[:-PROOF_BYTES]))
    return Answer(verdict, port, unpack_name(name)), right


def split(address: str) -> tuple[str, int]:
    """Host, without the brackets of an IPv6 address, and port of HOST:PORT.

    >>> split("[::1]:8476")
    ('::1', 8476)
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def bind_host(host: str) -> str:
    """The address to listen at, for processes that connect to `host`; empty: all addresses of this machine.

    A literal address is the same for everyone. What a name means may differ: many a host's own name is 127.0.1.1 to
    itself. Nor is an address that this machine does not have (behind NAT) one to listen at.

    >>> bind_host("127.0.0.1"), bind_host("localhost"), bind_host("node7")
    ('127.0.0.1', '127.0.0.1', '')
    """
    host = "127.0.0.1" if host == "localhost" else host
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return ""
    return host


def listen(host: str, port: int) -> socket.socket:
    """Listens at an address of :func:`bind_host`; port 0: any free port.

    Raises:
      OSError: the port is in use, or this process may not use it.
    """
    if host:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def knock(
    address: str, process: int, processes: int, token: bytes, attempts: int | None = None
) -> tuple[socket.socket, Answer]:
    """Connects to process 0, tries again until it answers, and waits until all processes have met there.

    Args:
      address: HOST:PORT of process 0.
      process: this process's number.
      processes: the number of processes.
      token: the job's token.
      attempts: how often it tries; None: for ever.

    Returns:
      the connection and the answer, WELCOME.

    Raises:
      RefusedError: process 0 does not let this process in; the message says why.
      OSError: after the last attempt, process 0 was not reached.
    """
    while True:
        try:
            return _knock_once(address, process, processes, token)
        except OSError:
            attempts = None if attempts is None else attempts - 1
            if attempts == 0:
                raise
            time.sleep(RETRY_SECONDS)


def _knock_once(address: str, process: int, processes: int, token: bytes) -> tuple[socket.socket, Answer]:
    peer = socket.create_connection(split(address), timeout=HELLO_SECONDS)
    try:
        if peer.getsockname() == peer.getpeername():
            raise ConnectionError("connected to itself")  # nobody listened at a port that the kernel gives to clients
        magic, challenge = CHALLENGE.unpack(receive(peer, CHALLENGE.size))
        if magic != MAGIC:
            raise ConnectionError("another program listens there")
        hello = Hello(secrets.token_bytes(32), process, processes, own_name())
        peer.sendall(pack_hello(hello, challenge, token))
        peer.settimeout(None)  # the answer comes when all processes are there
        answer, right = unpack_answer(receive(peer, ANSWER.size), hello.nonce, token)
        if right and answer.verdict == WELCOME:
            return peer, answer
        if right and answer.verdict == TAKEN:
            raise RefusedError(f"it is already there ({answer.name}); was the same command started twice?")
        if right and answer.verdict == COUNT:
            raise RefusedError(f"the run there has {answer.port} processes, not {processes}")
        raise RefusedError("a run is there with another token (CRATE_JAX_TOKEN)")
    except BaseException:
        peer.close()
        raise


def receive(peer: socket.socket, size: int) -> bytes:
    """Receives exactly `size` bytes.

    Raises:
      OSError: the connection broke or timed out before.
    """
    got = b""
    while len(got) < size:
        more = peer.recv(size - len(got))
        if not more:
            raise ConnectionError("the connection was closed")
        got += more
    return got
