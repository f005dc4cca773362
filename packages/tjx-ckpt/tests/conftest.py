"""Fixtures of checkpoint directories; S3 needs moto and s3fs, which tools/locks/s3.txt locks."""

import logging
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from checkpoint_place import Place
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """Return a bucket of an S3 server in this process."""
    reason = "needs s3fs and moto[server]: tools/locks/s3.txt; the nightly job runs it"
    pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def memory() -> Iterator[Place]:
    yield Place("memory://bucket/run")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def s3(s3_bucket: str, tmp_path: Path) -> Place:
    return Place(f"{s3_bucket}/{tmp_path.name}/run")


@pytest.fixture(params=["local", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "run"))
    found: Place = request.getfixturevalue(request.param)
    return found
