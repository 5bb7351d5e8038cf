"""The port where processes meet, against strangers: sockets and threads of this process; no JAX."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from crate_jax.parallel import meeting, watch
from crate_jax.parallel.meeting import Answer, Hello

TOKEN = b"a token of this job"
NONCE = bytes(range(32))
SERVICE = 4711  # the port of JAX's service, which only the job's processes are told


class Job:
    """A job of 3 processes on this machine, of which process 0's watch is real; `ends` gets what would end it."""

    def __init__(self) -> None:
        listener = meeting.listen("127.0.0.1", 0)
        self.ends: list[tuple[str, int]] = []
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.watch = watch.Watch(0, 3, TOKEN, listener, SERVICE)
        self.open: list[socket.socket] = []

    def connect(self) -> socket.socket:
        peer = socket.create_connection(meeting.split(self.address), timeout=5)
        self.open.append(peer)
        return peer

    def say(self, process: int = 1, processes: int = 3, token: bytes = TOKEN) -> socket.socket:
        """A connection that has said hello."""
        peer = self.connect()
        challenge = meeting.receive(peer, meeting.CHALLENGE.size)[8:]
        peer.sendall(meeting.pack_hello(Hello(NONCE, process, processes, f"the {process}."), challenge, token))
        return peer

    def meet(self) -> list[socket.socket]:
        peers = [self.say(1), self.say(2)]
        for peer in peers:
            answer, right = meeting.unpack_answer(meeting.receive(peer, meeting.ANSWER.size), NONCE, TOKEN)
            assert right and answer == Answer(meeting.WELCOME, SERVICE, meeting.own_name())
        assert self.watch.met.wait(5)
        return peers

    def ended(self) -> tuple[str, int]:
        for _ in range(500):
            if self.ends:
                return self.ends[0]
            time.sleep(0.01)
        raise AssertionError("nothing ended the job")

    def runs(self) -> bool:
        """Whether the watch still challenges who connects."""
        return not self.ends and meeting.receive(self.connect(), meeting.CHALLENGE.size)[:8] == meeting.MAGIC


@pytest.fixture
def job(monkeypatch) -> Iterator[Job]:
    """The end of this process is only recorded."""

    def die(line: str, status: int) -> None:
        job.ends.append((line, status))
        job.watch.end()

    monkeypatch.setattr(watch, "die", die)
    job = Job()
    yield job
    job.watch.end()
    for peer in job.open:
        peer.close()


def closed(peer: socket.socket) -> bool:
    """Whether process 0 closed the connection, with an answer or without."""
    with contextlib.suppress(ConnectionError):
        while peer.recv(4096):
            pass
    return True  # else `recv` timed out


def test_proofs_are_hmacs_of_all_that_is_said():
    """Python's hashlib says so; one bit anywhere, the challenge or the token make another proof."""
    hello = Hello(NONCE, 1, 3, "gpu7, pid 5")
    data = meeting.pack_hello(hello, b"c" * 32, TOKEN)
    assert data[-32:] == hmac.new(TOKEN, b"c" * 32 + data[:-32], hashlib.sha256).digest()
    assert meeting.unpack_hello(data, b"c" * 32, TOKEN) == (hello, True)
    assert not meeting.unpack_hello(data, b"d" * 32, TOKEN)[1] and not meeting.unpack_hello(data, b"c" * 32, b"")[1]
    answer = meeting.pack_answer(Answer(meeting.TAKEN, 513, "a"), hello, TOKEN)
    for text, right in (
        (data, lambda changed: meeting.unpack_hello(changed, b"c" * 32, TOKEN)[1]),
        (answer, lambda changed: meeting.unpack_answer(changed, NONCE, TOKEN)[1]),
    ):
        assert right(text)
        for i in range(len(text)):
            assert not right(text[:i] + bytes([text[i] ^ 4]) + text[i + 1 :]), i


def test_messages_are_taken_one_by_one_also_in_parts():
    gone = watch.GONE + watch.GONE_FORMAT.pack(2, 75, b"x".ljust(128, b"\0"))
    data, taken = watch.ALIVE + gone + watch.BYE, []
    for cut in range(len(data)):
        kind, detail, rest = watch.take_message(data[:cut])
        assert (kind, detail, rest) == ((watch.ALIVE, b"", data[1:cut]) if cut else (b"", b"", b""))
    while data:
        kind, _, data = watch.take_message(data)
        taken.append(kind)
    assert taken == [watch.ALIVE, watch.GONE, watch.BYE]
    assert watch.take_message(gone[:-1]) == (b"", b"", gone[:-1])
    with pytest.raises(watch.BrokenError):
        watch.take_message(b"G")


@pytest.mark.parametrize("seed", range(3))
def test_a_stranger_changes_nothing(seed, job):
    """Random bytes, parts of right ones and right ones with another token, at each stage, while others say nothing."""
    rng = random.Random(seed)
    silent = [job.connect() for _ in range(watch.MAX_STRANGERS - 8)]
    gone = watch.GONE + watch.GONE_FORMAT.pack(1, 0, bytes(128))

    def bother() -> None:
        for _ in range(30):
            peer = job.connect()
            hello = meeting.pack_hello(Hello(NONCE, rng.choice([0, 1, 2, 3, 2**32 - 1]), 3, "x"), NONCE, TOKEN)
            cut = hello[: rng.randrange(len(hello))]
            data = rng.choice(
                [
                    rng.randbytes(rng.randrange(1, 400)),
                    hello,
                    cut,
                    gone * 3,
                    hello[:40] + gone * 3,
                    b"PRI * HTTP/2.0\r\n",
                    b"",
                ]
            )
            with contextlib.suppress(OSError):
                peer.sendall(data)
            if rng.random() < 0.6:
                peer.close()
        closed(job.say(rng.randrange(3), token=b"of another job"))

    bother()
    start = time.monotonic()
    peers = job.meet()
    assert time.monotonic() - start < 2  # the silent ones delay nobody
    bother()
    peers[0].sendall(watch.ALIVE)
    assert job.runs() and len(silent) > 50
    peers[1].sendall(watch.GONE + watch.GONE_FORMAT.pack(2, 3, meeting.pack_name("two")))
    assert job.ended() == ("process 2 of 3 (two) failed with status 3; read its last lines. Process 0 stops", 3)


def test_one_who_says_nothing_is_closed_and_logged_once(job, monkeypatch, caplog):
    monkeypatch.setattr(meeting, "HELLO_SECONDS", 0.2)
    assert all(closed(peer) for peer in [job.connect(), job.connect()])
    assert len(caplog.records) == 1 and "127.0.0.1 was closed: it said nothing" in caplog.text


def test_a_second_process_of_a_number_is_refused_in_a_line(job):
    def refusal(*said) -> str:
        caught = ["not refused"]

        def knock() -> None:
            try:
                meeting.knock(job.address, *said, attempts=1)
            except meeting.RefusedError as e:
                caught.append(str(e))

        thread = threading.Thread(target=knock, daemon=True)  # one that is let in would wait for the others
        thread.start()
        thread.join(5)
        return caught[-1]

    assert refusal(2, 4, TOKEN) == "the run there has 3 processes, not 4"
    assert refusal(1, 3, b"") == "a run is there with another token (CRATE_JAX_TOKEN)"
    job.say(1)
    time.sleep(0.1)  # it must be there first
    for when in ("before all have come", "while the job runs"):
        assert refusal(1, 3, TOKEN) == "it is already there (the 1.); was the same command started twice?", when
        assert refusal(0, 3, TOKEN).startswith(f"it is already there ({meeting.own_name()}"), when
        if when == "before all have come":
            job.say(2)
            assert job.watch.met.wait(5)
    assert job.runs()


def test_a_process_without_a_name_keeps_its_place(job):
    peers = []
    for _ in range(2):
        peers.append(job.connect())
        challenge = meeting.receive(peers[-1], meeting.CHALLENGE.size)[8:]
        peers[-1].sendall(meeting.pack_hello(Hello(NONCE, 1, 3, ""), challenge, TOKEN))
    answer, right = meeting.unpack_answer(meeting.receive(peers[1], meeting.ANSWER.size), NONCE, TOKEN)
    assert right and answer == Answer(meeting.TAKEN, 0, "") and job.watch.missing() == [2]


def test_who_leaves_before_all_have_come_may_come_again(job):
    first = job.say(1)
    time.sleep(0.1)
    assert job.watch.missing() == [2]
    first.close()
    while 1 not in job.watch.missing():
        time.sleep(0.01)
    job.meet()
    assert job.runs()


BROKEN = {
    "of process 2": watch.GONE_FORMAT.pack(2, 75, bytes(128)),  # only process 0 speaks for others
    "of process 3": watch.GONE_FORMAT.pack(3, 75, bytes(128)),
    "with status 0": watch.GONE_FORMAT.pack(1, 0, bytes(128)),  # a stopped job would be taken for a finished one
}


@pytest.mark.parametrize("detail", BROKEN)
def test_a_process_that_sends_nonsense_ends_the_job_as_one_that_is_gone(detail, job):
    peers = job.meet()
    peers[0].sendall(watch.ALIVE + watch.GONE + BROKEN[detail])
    line, status = job.ended()
    assert status == watch.LOST and line.startswith("process 1 of 3 (the 1.) is gone")
    told = meeting.receive(peers[1], 1 + watch.GONE_FORMAT.size).lstrip(watch.ALIVE)
    assert told[:6] == watch.GONE + b"\0\0\0\1" + bytes([watch.LOST])


@pytest.fixture
def quick(monkeypatch) -> None:
    """Before the job begins."""
    monkeypatch.setattr(watch, "BEAT", 0.1)
    monkeypatch.setattr(watch, "SILENCE", 0.7)


def test_a_watch_sends_a_sign_of_life_now_and_then(quick):
    """Not an answer to each: two processes that did would keep each other, and their interpreters, busy."""
    ours, theirs = socket.socketpair()
    one = watch.Watch(1, 2, TOKEN, first=(ours, "zero"))
    for _ in range(25):
        theirs.sendall(watch.ALIVE)
        time.sleep(0.02)
    one.end()
    sent = theirs.recv(10_000)
    assert set(sent) == set(watch.ALIVE) and 3 <= len(sent) <= 8, sent
    ours.close()
    theirs.close()


def test_silence_names_the_process_unless_this_one_stood_still_itself(quick, job, monkeypatch):
    peers = job.meet()
    peers[1].sendall(watch.BYE)
    select = job.watch._selector.select

    def stand_still(timeout: float) -> list:
        monkeypatch.setattr(job.watch._selector, "select", select)
        time.sleep(1.2)
        return select(0)

    monkeypatch.setattr(job.watch._selector, "select", stand_still)
    time.sleep(1.4)
    assert job.runs()
    line, status = job.ended()
    assert status == watch.LOST and line.startswith("process 1 of 3 (the 1.) has been silent for 1 s: it is stopped")


def test_a_watch_that_fails_ends_its_process_with_a_line(job, monkeypatch):
    """A process that watched nobody would wait for ever for one that is gone."""
    peers = job.meet()
    monkeypatch.setattr(job.watch._selector, "select", lambda timeout: 1 / 0)
    peers[0].sendall(watch.ALIVE)
    line, status = job.ended()
    assert status == watch.LOST and line.startswith(
        "process 0 of 3 cannot watch the others any more (ZeroDivisionError"
    )


ALL = ("::", "0.0.0.0")


@pytest.mark.parametrize(("host", "places"), [("127.0.0.1", ["127.0.0.1"]), ("::1", ["::1", *ALL]), ("node7", ALL)])
def test_it_listens_where_the_address_says(host, places):
    """A name may mean another address elsewhere, so it gives all addresses."""
    with meeting.listen(meeting.bind_host(host), 0) as listener:
        assert listener.getsockname()[0] in places
    assert meeting.bind_host("localhost") == "127.0.0.1" and meeting.bind_host(socket.gethostname()) == ""
    assert meeting.bind_host("192.0.2.1") == ""  # not an address of this machine (RFC 5737)
