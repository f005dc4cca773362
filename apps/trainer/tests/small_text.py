"""A training text of a few thousand characters, as flags of the trainer."""

from pathlib import Path


def flags_of_sheep(folder: Path) -> list[str]:
    """Write a text of lines of several lengths; return the flags that train on it."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} sheep and {'more ' * (n % 5)}\n" for n in range(300)))
    return [f"--data.path={text}", f"--data.cache_dir={folder / 'cache'}"]
