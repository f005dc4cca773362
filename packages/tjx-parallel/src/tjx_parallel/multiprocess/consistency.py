"""Refuse processes that were started with different values."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed

_TIMEOUT_MS = 3_600_000  # one process may prepare data for hours


def check_equal_across_processes(name: str, values: Mapping[str, Any]) -> None:
    """Raise in every process if one of them has other values; with one process return at once.

    Different hyperparameters or data in one process do not stop a collective: the run would train
    on a mixture of both without an error. No device is used.

    Parameters
    ----------
    name
        What the values are; used once in the life of the processes.
    values
        By name. Compared as their text in JSON, or as their `str`.

    Raises
    ------
    ValueError
        In all processes, naming each value that differs between process 0 and the first other one.
    """
    if jax.process_count() == 1:
        return
    client = distributed.global_state.client
    assert client is not None
    place = f"tjx-parallel/{name}"
    texts = {key: json.dumps(value, default=str) for key, value in values.items()}
    whole = json.dumps(texts, sort_keys=True)
    index = jax.process_index()
    client.key_value_set(f"{place}/values/{index}", whole)
    client.key_value_set(f"{place}/digests/{index}", hashlib.sha256(whole.encode()).hexdigest())
    client.wait_at_barrier(place, _TIMEOUT_MS)
    entries = client.key_value_dir_get(f"{place}/digests/")
    digests = {int(key.rpartition("/")[2]): digest for key, digest in entries}
    other = next((n for n in sorted(digests) if digests[n] != digests[0]), None)
    # All have read what they need before one of them ends and takes the service with it.
    first, second = (
        json.loads(client.blocking_key_value_get(f"{place}/values/{n}", _TIMEOUT_MS))
        for n in (0, other or 0)
    )
    client.wait_at_barrier(f"{place}/read", _TIMEOUT_MS)
    if other is None:
        return
    lines = [
        f"{key}: got {first.get(key, 'nothing')} in process 0 and {second.get(key, 'nothing')} in "
        f"process {other}; expected the same in all processes; start all of them with one {name}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]
    raise ValueError("\n".join(lines))
