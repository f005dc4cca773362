"""Rendezvous of all processes before `jax.distributed.initialize`, with clear errors.

If its port is in use or a process is missing, JAX aborts in native code without a usable error or
exit code. Therefore process 0 first listens on the coordinator's address itself; every other
process reports its id and waits for the answer.
"""

import contextlib
import errno
import socket
import time
from collections.abc import Iterator

_GREETING = "tjx-parallel/1"
_RETRY_S = 0.2
_MOST_BYTES = 1000


def wait_for_all(
    coordinator: str, bind_address: str, *, count: int, index: int, timeout_s: float
) -> None:
    """Block until all processes have connected to process 0; every process calls it.

    Parameters
    ----------
    coordinator
        host:port of process 0.
    bind_address
        host:port on which process 0 listens.
    count, index
        Number of processes and id of this one.
    timeout_s
        Timeout in seconds.

    Raises
    ------
    ValueError
        If process 0 cannot listen on the address, a process does not connect in time, or two
        processes have the same id or different counts.
    """
    if count == 1:
        return
    end = time.monotonic() + timeout_s
    if index == 0:
        _collect(bind_address, count, end, timeout_s)
    else:
        _report(coordinator, count, index, end, timeout_s)


def _collect(bind_address: str, count: int, end: float, timeout_s: float) -> None:
    """Accept the reports of all other processes, then answer each of them."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(bind_address, count))
        waiting: dict[int, socket.socket] = {}
        arrived: list[socket.socket] = []
        try:
            while len(waiting) + 1 < count:
                server.settimeout(max(0.0, end - time.monotonic()))
                try:
                    connection = stack.enter_context(server.accept()[0])
                except (TimeoutError, BlockingIOError):
                    missing = [str(n) for n in range(1, count) if n not in waiting]
                    raise ValueError(
                        f"distributed.num_processes: got {len(waiting) + 1} of {count} processes "
                        f"within {timeout_s:g} seconds (distributed.start_timeout); expected all; "
                        f"start those with distributed.process_id {', '.join(missing)}, with "
                        f"distributed.coordinator {bind_address}, and see that they reach it"
                    ) from None
                arrived.append(connection)
                if (number := _number(connection, count)) is not None:
                    if number in waiting:
                        raise ValueError(
                            f"distributed.process_id: got {number} for two processes; expected "
                            "another number for each; correct one of them"
                        )
                    waiting[number] = connection
        except ValueError as error:
            for connection in arrived:
                _send(connection, f"error {error}")
            raise
        for connection in waiting.values():
            _send(connection, "go")


def _number(connection: socket.socket, count: int) -> int | None:
    """Return the id that a process reports; None for an unrelated connection.

    Raises
    ------
    ValueError
        If the process expects another number of processes.
    """
    connection.settimeout(5)
    match _receive(connection).split():
        case [greeting, theirs, number] if greeting == _GREETING and number.isdecimal():
            if theirs != str(count):
                raise ValueError(
                    f"distributed.num_processes: got {count} in process 0 and {theirs} in process "
                    f"{number}; expected one number; give all processes the same flags"
                )
            return int(number) if 0 < int(number) < count else None
    return None


def _report(coordinator: str, count: int, index: int, end: float, timeout_s: float) -> None:
    """Report this process to process 0 and wait for the answer."""
    reason = "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection(_address(coordinator), timeout=min(left, 10)) as server:
                _send(server, f"{_GREETING} {count} {index}")
                server.settimeout(max(0.1, end + 10 - time.monotonic()))
                answer = _receive(server)
        except OSError as error:
            reason = str(error)
        else:
            if answer == "go":
                return
            if answer.startswith("error "):
                raise ValueError(answer.removeprefix("error "))
        time.sleep(_RETRY_S)
    raise ValueError(
        f"distributed.coordinator: got {coordinator}, which did not answer within {timeout_s:g} "
        f"seconds (distributed.start_timeout): {reason}; expected process 0 there; start it, and "
        "see that this machine reaches the address"
    )


@contextlib.contextmanager
def _listen(bind_address: str, count: int) -> Iterator[socket.socket]:
    host, port = _address(bind_address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((host, port), family=family, backlog=max(count, 128))
    except OSError as error:
        advice = "give an address of this machine, with a free port"
        if error.errno == errno.EADDRINUSE:
            advice = "another program listens on this port: end it, or give another port"
        raise ValueError(
            f"distributed.coordinator: got {bind_address}; expected an address on which process 0 "
            f"can listen ({error.strerror or error}); {advice}"
        ) from None
    with server:
        yield server


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _send(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # JAX detects a process that has exited
        connection.sendall(f"{line}\n".encode())


def _receive(connection: socket.socket) -> str:
    """Receive one line; "" if the connection sends none."""
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < _MOST_BYTES:
            if not (more := connection.recv(_MOST_BYTES)):
                break
            data += more
    return data.decode("utf-8", "replace").strip()
