"""Program that limits its own resources and then becomes the program to run.

python launcher.py CPU_SECONDS MEMORY_BYTES FILE_BYTES PROGRAM
"""

import os
import resource
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Set the limits and replace this process by the program."""
    seconds, memory, size = map(int, arguments[:3])
    for name, value in {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }.items():
        resource.setrlimit(name, (value, value))
    os.execv(sys.executable, [sys.executable, "-I", "-S", arguments[3]])  # noqa: S606  as intended


if __name__ == "__main__":
    main(sys.argv[1:])
