"""`train.reproducible mesh`: the same bits on every mesh of data and fsdp devices."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
import reproducible_runs

from tjx_core import ConfigError
from tjx_trainer.cli.arguments import resolve
from tjx_trainer.runtime.provenance import describe_version_changes
from tjx_trainer.runtime.xla_flags import request_reproducibility
from tjx_trainer.training.reproducible import local_tree_sum

MESH = "--train.reproducible=mesh"
ONE, EIGHT = ["data=1"], ["data=8"]
HYBRID = ["data=2", "fsdp=4", "zero=2"]
ZERO = [["data=1", f"fsdp={n}", f"zero={zero}"] for n in (2, 4, 8) for zero in (1, 2, 3)]


def trained(*cases: tuple[list[list[str]], Sequence[str]]) -> list[dict[str, Any]]:
    """Run `reproducible_runs` with the XLA flags that the trainer sets; a case: meshes, flags."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_NUM_CPU_DEVICES": "8",
    }
    request_reproducibility(environment)
    done = subprocess.run(
        [sys.executable, reproducible_runs.__file__, *map(json.dumps, cases)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(cases) :]]


def test_every_mesh_has_the_same_bits_only_in_the_mode_also_resumed_on_another() -> None:
    meshes = [ONE, HYBRID, ["data=1", "fsdp=4", "zero=3"]]
    found, without = trained((meshes, [MESH]), ([ONE, EIGHT], []))
    assert len({*found["runs"].values(), found["resumed"]}) == 1, found
    assert len({*without["runs"].values()}) == 2, without


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--train.precision=fp32", "--optimizer.name=muon", "--optimizer.clip_norm=0.1"),
        ("--train.precision=fp16", "--optimizer.name=lamb", "--log.layer_norms_every=1"),
        ("--model.experts.count=4", "--model.experts.balance_loss=0.01"),
    ],
    ids=["adamw", "muon", "lamb", "experts"],
)
def test_every_mesh_of_the_table_has_the_same_bits(flags: tuple[str, ...]) -> None:
    meshes = [ONE, ["data=2"], ["data=4"], EIGHT, HYBRID, *ZERO]
    (found,) = trained((meshes, [MESH, *flags]))
    assert len({*found["runs"].values(), found["resumed"]}) == 1, found


@pytest.mark.parametrize("count", [1, 2, 8])
def test_local_sums_follow_a_balanced_tree(count: int) -> None:
    # Sums whose order shows: each addition rounds.
    terms = np.random.default_rng(0).standard_normal((count, 64)).astype(np.float32)
    expected = terms
    while len(expected) > 1:
        expected = expected[::2] + expected[1::2]
    summed = jax.jit(lambda x: local_tree_sum(lambda index: x[index], count))
    found = jax.device_get(summed(jax.device_put(terms)))
    np.testing.assert_array_equal(found, expected[0])


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--mesh.tensor=2"], "mesh.tensor: got 2; expected 1 with train.reproducible=mesh"),
        (["--mesh.context=2"], "mesh.context: got 2; expected 1 with"),
        (["--mesh.stage=2"], "mesh.stage: got 2; expected 1 with"),
        (
            ["--mesh.expert=2", "--model.experts.count=2", "--model.experts.capacity_factor=1.0"],
            "mesh.expert: got 2; expected 1 with",
        ),
        (["--mesh.data=2", "--mesh.fsdp=8"], "train.virtual_shards: got 8; expected a multiple of"),
        (["--train.virtual_shards=12"], "train.virtual_shards: got 12; expected a power of 2"),
        (["--train.batch_size=12"], "train.batch_size: got 12; expected a multiple of 8"),
        (
            ["--mesh.reduce_dtype=bfloat16", "--train.precision=bf16"],
            "mesh.reduce_dtype: got bfloat16; expected float32 with train.reproducible=mesh",
        ),
    ],
)
def test_what_would_change_bits_is_refused(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([MESH, *flags])
    assert problem in str(caught.value)


def test_microbatches_do_not_depend_on_the_mesh() -> None:
    flags = ["--train.batch_size=64", "--train.device_batch_size=2", MESH]
    for mesh in (["--mesh.data=1"], ["--mesh.data=2", "--mesh.fsdp=4"]):
        config = resolve([*flags, *mesh])
        sizes = {"data": config.mesh.data, "fsdp": config.mesh.fsdp, "expert": 1, "stage": 1}
        assert config.accumulation_for(sizes) == 4  # 64 rows of 8 virtual shards, two at a time


def test_another_mesh_is_no_reason_for_other_bits() -> None:
    saved: dict[str, Any] = {"versions": {}, "devices": "8 cpu in 1 processes, mesh data 8"}
    now = {**saved, "devices": "2 cpu in 2 processes, mesh fsdp 2"}
    assert "results may differ in bits" in str(describe_version_changes(saved, now))
    now["config"] = {"train.reproducible": "mesh"}
    assert describe_version_changes(saved, now) is None
    now["devices"] = "2 NVIDIA H100 in 2 processes, mesh fsdp 2"
    assert "results may differ in bits" in str(describe_version_changes(saved, now))


def test_another_revision_is_a_reason_for_other_bits() -> None:
    saved: dict[str, Any] = {"versions": {}, "devices": "1 cpu", "git": {"revision": "1" * 40}}
    assert describe_version_changes(saved, saved) is None
    assert describe_version_changes(saved, {**saved, "git": None}) is None
    found = describe_version_changes(saved, {**saved, "git": {"revision": "2" * 40}})
    assert found == "git revision 11111111 -> 22222222: results may differ in bits"


def test_a_file_of_flags_is_refused() -> None:
    with pytest.raises(ConfigError, match="got mesh with XLA_FLAGS"):
        request_reproducibility({"XLA_FLAGS": "flags.txt"})
