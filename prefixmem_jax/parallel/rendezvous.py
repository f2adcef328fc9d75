"""All processes of a run wait for each other before JAX starts, and are told who is missing.

JAX waits too, but beyond the reach of exceptions, and names nobody. The first process listens where
JAX's coordinator will; the others tell it their numbers, and it tells all of them to go on, or who
has not come.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from prefixmem_jax.errors import UserError

_GO, _NO = "prefixmem: go", "prefixmem: no: "
_RETRY = 0.2  # seconds
_TO_SPEAK = 5.0  # seconds that a connection has to say who it is
_LONGEST = 4096  # bytes of a message


def meet(host: str, port: int, processes: int, number: int, seconds: float) -> None:
    """Returns when all processes have called it.

    Args:
      host, port: of the first process.
      number: of this process.

    Raises:
      UserError: somebody has not come in time, two have the same number, they do not agree on how
        many they are, or the port is taken.
    """
    if processes == 1:
        return
    deadline = time.monotonic() + seconds
    if number == 0:
        _gather(port, processes, deadline, seconds)
    else:
        _report(host, port, processes, number, deadline, seconds)


def _gather(port: int, processes: int, deadline: float, seconds: float) -> None:
    """The first process: collects the others."""
    there: dict[int, socket.socket] = {}
    verdict = None
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(_listening(port))
        except OSError as error:
            raise UserError(f"--distributed: port {port}: {error.strerror}") from None
        while verdict is None:
            there = {number: one for number, one in there.items() if _is_open(one)}
            if len(there) == processes - 1:
                break
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(number) for number in range(1, processes) if number not in there]
                verdict = _missing(missing, processes, seconds)
                break
            stack.enter_context(connection)
            said = _line(connection, min(deadline, time.monotonic() + _TO_SPEAK)).split()
            if len(said) != 2 or not all(word.isdecimal() for word in said):
                continue  # nobody of ours
            number, of = map(int, said)
            if of != processes:
                verdict = f"process {number} says that they are {of}, the first that {processes}"
            elif number in there and _is_open(there[number]):
                verdict = f"two processes say that they are number {number} of {processes}"
            if verdict is None:
                there[number] = connection
            else:
                _tell(connection, _NO + verdict)
        for connection in there.values():
            _tell(connection, _GO if verdict is None else _NO + verdict)
        for connection in there.values():  # they hang up first, so that the port is free at once
            _line(connection, time.monotonic() + _TO_SPEAK)
    if verdict is not None:
        raise UserError(f"--distributed: {verdict}")


def _report(
    host: str, port: int, processes: int, number: int, deadline: float, seconds: float
) -> None:
    """Any other process: says that it is there, and hears whether all are."""
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _tell(connection, f"{number} {processes}")
                # Whoever listens there may have begun just now, and waits as long as this did.
                said = _line(connection, time.monotonic() + seconds + _TO_SPEAK)
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if said == _GO:
                return
            if said.startswith(_NO):
                raise UserError(f"--distributed: {said.removeprefix(_NO)}")
            reason = "something else listens there" if said else "it hung up"
        time.sleep(_RETRY)
    raise UserError(
        f"--distributed: the first process did not answer at {host}:{port} within {seconds:g} s "
        f"({reason})"
    )


def _missing(missing: list[str], processes: int, seconds: float) -> str:
    who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
    return f"{who} of {processes} did not come within {seconds:g} s (they count from 0)"


@contextlib.contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as listener:
        yield listener


def _tell(connection: socket.socket, message: str) -> None:
    connection.settimeout(_TO_SPEAK)
    with contextlib.suppress(OSError):
        connection.sendall(f"{message}\n".encode())


def _is_open(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing more to say, is still there."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _line(connection: socket.socket, deadline: float) -> str:
    """What the other side says up to the end of a line; nothing where it does not say so much."""
    said = b""
    try:
        while not said.endswith(b"\n") and len(said) < _LONGEST:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            more = connection.recv(_LONGEST)
            if not more:
                return ""
            said += more
    except OSError:
        return ""
    return said.decode(errors="replace").strip()
