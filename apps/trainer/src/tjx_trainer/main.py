"""The trainer's program."""

import sys
from collections.abc import Sequence

from tjx_ckpt.errors import CheckpointError
from tjx_data.corpora.hub import HubError
from tjx_trainer.command_line import parse, refuse
from tjx_trainer.config import ConfigError
from tjx_trainer.exit_codes import EXIT_NOT_FINITE, EXIT_USER_ERROR, NotFiniteError


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns
    -------
    int
        0 when the run is finished, 2 when the user can mend what is wrong, 3 when it diverged, 128
        + the signal's number when the run was asked to stop and is saved.
    """
    config = parse(sys.argv[1:] if argv is None else argv)

    # It brings JAX, which takes seconds to import: a wrong command line is answered before.
    from tjx_trainer.train import train

    try:
        return train(config)
    except ConfigError as error:
        refuse(error)
    except (HubError, CheckpointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    except NotFiniteError as error:
        sys.stderr.write("; ".join([f"error: {error}", *getattr(error, "__notes__", [])]) + "\n")
        return EXIT_NOT_FINITE


if __name__ == "__main__":
    sys.exit(main())
