"""Rendezvous errors: missing processes and unusable addresses."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tjx_parallel.multiprocess.rendezvous import wait_for_all


def barrier(count: int, index: int, address: str, timeout_s: float = 20.0) -> str:
    """Return the error of a process; "" if all processes connected."""
    try:
        wait_for_all(address, address, count=count, index=index, timeout_s=timeout_s)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_all_processes_connect_and_unrelated_connections_are_ignored(address: str) -> None:
    host, port = address.split(":")
    with ThreadPoolExecutor(4) as pool:
        zero = pool.submit(barrier, 3, 0, address)
        while True:
            try:
                with socket.create_connection((host, int(port)), timeout=5) as stranger:
                    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                break
            except ConnectionRefusedError:
                continue
        others = [pool.submit(barrier, 3, index, address) for index in (1, 2)]
        assert [done.result() for done in (zero, *others)] == ["", "", ""]


def test_a_missing_process_is_reported_to_all(address: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        zero, one = (pool.submit(barrier, 3, index, address, 1.0) for index in (0, 1))
    assert zero.result() == one.result()
    assert re.search(r"got 2 of 3 processes within 1 seconds .*process_id 2,", zero.result())


def test_missing_process_0_raises(address: str) -> None:
    assert re.search("did not answer within 0.5 seconds .*refused", barrier(2, 1, address, 0.5))


def test_a_port_in_use_raises() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = barrier(2, 0, f"127.0.0.1:{taken.getsockname()[1]}")
    assert "another program listens on this port" in told
    assert "give an address of this machine" in barrier(2, 0, "192.0.2.1:1234")


def test_duplicate_process_ids_raise(address: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        told = [
            done.result() for done in [pool.submit(barrier, 4, n, address, 2.0) for n in (0, 1, 1)]
        ]
    assert all("got 1 for two processes" in text for text in told)


def test_different_process_counts_raise(address: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        zero, one = pool.submit(barrier, 3, 0, address), pool.submit(barrier, 2, 1, address, 1.0)
    assert "got 3 in process 0 and 2 in process 1" in zero.result()
    assert one.result() == zero.result()
