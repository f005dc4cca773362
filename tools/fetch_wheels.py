"""Download the distributions in lock files in parallel, into a folder that Pants' pex reads.

`fetch_wheels.py UV FOLDER LOCKS` reads the lock files of Pants' resolves in the folder LOCKS. uv
looks up the addresses of the files; of each distribution the best wheel for this interpreter is
downloaded, else its source archive. A file whose SHA-256 is not in the lock is an error.
"""

import hashlib
import os
import re
import ssl
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import urlopen

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

# Locks of Pants' resolves, of the wheel builder, and of the pip that pex installs first.
LOCKS = ("cpu", "pytest", "mypy", "ruff", "build", "docs", "pip")
PARALLEL_DOWNLOADS = 12
RANK = {tag: rank for rank, tag in enumerate(sys_tags())}


def locate(uv: str, lock: Path) -> list[dict[str, Any]]:
    """Return the packages of a lock with the addresses of their files, found by uv."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "pylock.toml"
        subprocess.run(
            [uv, "pip", "compile", "--quiet", "--no-deps", "--generate-hashes",
             "--format=pylock.toml", f"--python={sys.executable}", f"--output-file={found}", lock],
            check=True,
        )  # fmt: skip
        packages: list[dict[str, Any]] = tomllib.loads(found.read_text())["packages"]
    return packages


def choose(package: dict[str, Any]) -> dict[str, Any]:
    """Return the file of a package that pip would choose for this interpreter."""

    def rank(wheel: dict[str, Any]) -> int:
        tags = parse_wheel_filename(file_name(wheel))[3]
        return min((RANK[tag] for tag in tags if tag in RANK), default=len(RANK))

    wheels = [wheel for wheel in package.get("wheels", []) if rank(wheel) < len(RANK)]
    if not wheels and "sdist" not in package:
        raise ValueError(f"{package['name']} {package['version']} has no file for this platform")
    return min(wheels, key=rank) if wheels else package["sdist"]


def file_name(file: dict[str, Any]) -> str:
    """Return the name of a file of an index."""
    return unquote(file["url"].rpartition("/")[2])


def download(file: dict[str, Any], folder: Path, allowed: str) -> None:
    """Download a file that is not there yet and verify its digest against the locks."""
    target = folder / file_name(file)
    if target.exists():
        return
    certificates = os.environ.get("SSL_CERT_FILE") or os.environ.get("PIP_CERT")
    context = ssl.create_default_context(cafile=certificates)
    with urlopen(file["url"], context=context) as answer:  # noqa: S310  an address of the index
        data = answer.read()
    if hashlib.sha256(data).hexdigest() not in allowed:
        raise ValueError(f"{target.name} has another SHA-256 than the locks say")
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    partial.write_bytes(data)
    partial.replace(target)


def main(uv: str, folder: Path, locks: Path) -> None:
    """Download the files of all locks."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [locks / f"{name}.txt" for name in LOCKS]
    allowed = " ".join(re.findall(r"sha256:(\w{64})", "".join(p.read_text() for p in paths)))
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        files = [
            choose(p) for packages in pool.map(locate, [uv] * len(paths), paths) for p in packages
        ]
        list(pool.map(download, files, [folder] * len(files), [allowed] * len(files)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
