"""Check that all processes were started with equal values."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

# Public JAX exchanges values by device collectives only, which time out while a process prepares
# data.
from jax._src import distributed

_TIMEOUT_MS = 3_600_000  # preparing data or verifying responses may take long in one process


def wait_on_host(name: str) -> None:
    """Block until all processes have called it with a name, which is used once; no device waits."""
    client = distributed.global_state.client
    assert client is not None
    client.wait_at_barrier(name, _TIMEOUT_MS)


def check_equal_across_processes(name: str, values: Mapping[str, Any]) -> None:
    """Raise in every process if the values differ between processes.

    Collectives run with different hyperparameters or data per process too, so the run would train
    on a mixture without an error. Uses JAX's coordination service, no device. With one process it
    returns at once.

    Parameters
    ----------
    name
        Description of the values, unique within the lifetime of the processes.
    values
        Values by name, compared as JSON, or as `str` if they have no JSON form.

    Raises
    ------
    ValueError
        In all processes, with each value that differs between process 0 and the first process that
        deviates from it.
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
    # All processes read before one of them exits and shuts down the service.
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
