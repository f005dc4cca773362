"""Load the golden adapters and save them with tjx_nn.lora.save, for `make_peft_golden.py --check`.

python write_peft.py ../../packages/tjx-nn/tests/golden /tmp/saved
"""

import argparse
from pathlib import Path

from tjx_nn import hf, lora


def main() -> None:
    """Read and write each adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("golden", type=Path)
    parser.add_argument("saved", type=Path)
    arguments = parser.parse_args()
    for folder in sorted(arguments.golden.glob("peft_*")):
        config, _ = hf.load(arguments.golden / folder.name.split("_")[1])
        lora.save(arguments.saved / folder.name, config, *lora.load(folder, config))


if __name__ == "__main__":
    main()
