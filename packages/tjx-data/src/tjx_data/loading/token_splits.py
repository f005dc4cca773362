"""Training and validation tokens of a run in the user's own files."""

from pathlib import Path
from typing import NamedTuple

from tjx_core import ConfigError, Problem, problems_of
from tjx_data.config import TOKEN_SUFFIXES, DataConfig
from tjx_data.corpora.documents import SplitName
from tjx_data.loading.token_files import FileTokens, check_token_file


class TokenFiles(NamedTuple):
    """Token files of the two splits.

    Attributes
    ----------
    train : Path
        File of the training tokens.
    validation : Path or None
        File of the validation tokens; None if they are the end of `train`.
    """

    train: Path
    validation: Path | None


def _find(path: str, *, holdout: str) -> TokenFiles | None:
    """Return the token files that a path names, or None if it names no token file.

    Parameters
    ----------
    path : str
        A ``.bin`` or ``.npy`` file, or a folder with ``train.bin`` or ``train.npy``.
    holdout : str
        With "tail", the validation tokens are the end of the training file; else they are in the
        file beside it that has "val" instead of "train" in its name.

    Raises
    ------
    ConfigError
        If there is no file of validation tokens, or a folder has files of both formats.
    """
    train = Path(path).expanduser()
    if train.is_dir():
        found = [train / f"train{suffix}" for suffix in TOKEN_SUFFIXES]
        found = [file for file in found if file.is_file()]
        if len(found) > 1:
            message = (
                f"got {path!r}, which has train.bin and train.npy; expected one; name the file"
            )
            raise ConfigError([Problem("path", message)])
        if not found:
            return None
        (train,) = found
    elif train.suffix.lower() not in TOKEN_SUFFIXES:
        return None
    if holdout == "tail":
        return TokenFiles(train, None)
    stem = train.stem if "train" in train.stem else "train"
    names = [stem.replace("train", split) + train.suffix for split in ("val", "validation")]
    for name in names:
        if (file := train.with_name(name)).is_file() and file != train:
            return TokenFiles(train, file)
    message = (
        f"got {path!r} without {' or '.join(names)} beside it; expected a file of validation "
        "tokens; write one, or give --data.holdout tail, which holds out the end of the file"
    )
    raise ConfigError([Problem("path", message, ("holdout",))])


def find_token_files(config: DataConfig) -> TokenFiles | None:
    """Return the token files of a config, or None if its data are no token files.

    Parameters
    ----------
    config : DataConfig
        `path` may name a folder with ``train.bin``, or a ``.bin`` or ``.npy`` file.

    Returns
    -------
    TokenFiles or None
        Paths of the training and validation tokens.

    Raises
    ------
    ConfigError
        If there is no file of validation tokens, or a setting needs text.
    """
    if not config.reads_tokens:
        return None
    assert config.path is not None
    problems: list[Problem] = []
    for name, value, what in (
        ("packing", "documents", "windows: token files have no document borders"),
        ("tokenizer", "char", "the tokenizer that made the tokens"),
    ):
        if getattr(config, name) == value:
            message = f"got {value!r} with token ids in data.path; expected {what}; leave it out"
            problems.append(Problem(name, message, ("path",)))
    problems += [
        Problem(
            name,
            f"got {getattr(config, name)} with token ids in data.path, whose documents are "
            "unknown; expected none; give data.max_tokens",
            ("path",),
        )
        for name in ("max_documents", "subset")
        if name in config.budget
    ]
    try:
        files = _find(config.path, holdout=config.holdout)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return files


def token_file_problems(config: DataConfig) -> list[Problem]:
    """Check that the token files of a config have valid sizes and headers, without reading ids."""
    try:
        files = find_token_files(config)
        for file in files or ():
            if file is not None:
                check_token_file(file, config.id_dtype)
    except ValueError as error:
        return list(problems_of(error))
    return []


def open_token_split(
    config: DataConfig, files: TokenFiles, split: SplitName, *, vocab_size: int
) -> FileTokens:
    """Open the tokens of one split.

    Parameters
    ----------
    config : DataConfig
        With `verify` the file is hashed even if an earlier hash is cached.
    files : TokenFiles
        From `find_token_files`.
    split : {"train", "validation"}
        The split.
    vocab_size : int
        Ids are below it.

    Returns
    -------
    FileTokens
        The tokens, a source for `TokenLoader`.

    Raises
    ------
    ValueError
        If the file is damaged or of another format.
    """
    file, keep = files.train, (0.0, 1.0)
    if files.validation is None:
        border = 1 - config.holdout_fraction
        keep = (0.0, border) if split == "train" else (border, 1.0)
    elif split == "validation":
        file = files.validation
    return FileTokens(
        file,
        vocab_size=vocab_size,
        id_dtype=config.id_dtype,
        keep=keep,
        max_tokens=config.max_tokens if split == "train" else None,
        use_cache=not config.verify,
    )
