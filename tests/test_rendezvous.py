"""Processes, here threads, that meet: all go on together, or all hear who is missing."""

import contextlib
import socket
import threading
import time

import pytest

from prefixmem_jax.errors import UserError
from prefixmem_jax.parallel.rendezvous import meet


def meeting(port: int, come: tuple[int, ...], processes: int, seconds: float) -> list[str]:
    """What each of some processes, here threads, hears: an error, or nothing."""
    heard = [""] * len(come)

    def run(at: int, number: int) -> None:
        try:
            meet("127.0.0.1", port, processes, number, seconds)
        except UserError as error:
            heard[at] = str(error)

    threads = [threading.Thread(target=run, args=one) for one in enumerate(come)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    socket.create_server(("127.0.0.1", port)).close()  # free for JAX at once
    return heard


@pytest.mark.parametrize(
    "come, words",
    [
        ((0, 2), "process 1 of 3 did not come within 2 s (they count from 0)"),
        ((0, 3), "processes 1, 2 of 4 did not come within 2 s (they count from 0)"),
        ((0, 2, 2), "two processes say that they are number 2 of 3"),
    ],
)
def test_all_that_came_hear_who_did_not(come, words, free_port):
    heard = meeting(free_port, come, max(come) + 1, 2)
    assert heard == [f"--distributed: {words}"] * len(come)


def _last(port: int, number: int = 3, processes: int = 4) -> bool:
    meet("127.0.0.1", port, processes, number, 30)
    return True


def test_a_process_that_comes_long_before_the_first_hears_the_same(free_port):
    heard = []

    def come_early() -> None:
        with pytest.raises(UserError) as error:
            meet("127.0.0.1", free_port, 3, 2, 8)
        heard.append(str(error.value))

    early = threading.Thread(target=come_early)
    early.start()
    time.sleep(2)
    heard += meeting(free_port, (0,), 3, 12)  # it ends later than the other would by itself
    early.join(60)
    words = "--distributed: process 1 of 3 did not come within 12 s (they count from 0)"
    assert heard == [words, words]


def test_a_process_that_was_started_again_counts_once(free_port):
    heard = []
    both = threading.Thread(target=lambda: heard.extend(meeting(free_port, (0, 2), 4, 30)))
    both.start()
    for _ in range(200):
        try:
            with socket.create_connection(("127.0.0.1", free_port)) as killed:
                killed.sendall(b"1 4\n")
                time.sleep(0.5)  # it is counted
            break
        except OSError:
            time.sleep(0.05)  # nobody listens yet
    again = threading.Thread(target=_last, args=(free_port, 1))
    again.start()
    time.sleep(0.5)
    assert both.is_alive() and again.is_alive()
    assert _last(free_port)
    again.join(60)
    both.join(60)
    assert heard == ["", ""]


def test_processes_that_count_otherwise_are_told(free_port):
    heard = []
    first = threading.Thread(target=lambda: heard.extend(meeting(free_port, (0,), 3, 30)))
    first.start()
    with pytest.raises(UserError, match="process 3 says that they are 4, the first that 3"):
        _last(free_port)
    first.join(60)
    assert "process 3 says that they are 4" in heard[0]


def test_another_service_on_the_port_is_not_believed(free_port):
    with socket.create_server(("127.0.0.1", free_port)) as server:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                    connection.close()

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UserError, match=r"did not answer at .* within 1 s \(.*\)"):
            meet("127.0.0.1", free_port, 2, 1, 1)


def test_no_meeting_of_one_and_no_port_for_two(free_port):
    meet("nowhere", free_port, 1, 0, 0.1)
    taken = socket.create_server(("", free_port))
    with taken, pytest.raises(UserError, match=f"port {free_port}: Address already in use"):
        meet("127.0.0.1", free_port, 2, 0, 1)


def test_processes_that_meet_go_on_and_strangers_are_not_counted(free_port):
    heard, ends = [], []

    def three() -> None:
        heard.extend(meeting(free_port, (0, 1, 2), 4, 30))
        ends.append(time.monotonic())

    thread = threading.Thread(target=three)
    thread.start()
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"7 8 9\n", b"", b"-1 4\n"):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", free_port), 20) as stranger:
                    stranger.sendall(said)
                break
            except OSError:
                time.sleep(0.05)  # nobody listens yet
    time.sleep(0.5)
    last = time.monotonic()
    assert not ends and _last(free_port)
    thread.join(60)
    assert heard == ["", "", ""] and ends[0] >= last
