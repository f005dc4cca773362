"""The kinds of fuzzing by name. Each brings its own imports: a worker needs those of its kind."""

from collections.abc import Callable

from campaigns.fuzz_kind import Kind


def _config_file() -> Kind:
    from campaigns.fuzz_config import ConfigFile

    return ConfigFile()


def _command_line() -> Kind:
    from campaigns.fuzz_config import CommandLine

    return CommandLine()


def _prepared_set() -> Kind:
    from campaigns.fuzz_prepared import PreparedSet

    return PreparedSet()


def _corpus_file() -> Kind:
    from campaigns.fuzz_corpus import CorpusFile

    return CorpusFile()


def _tokenizer() -> Kind:
    from campaigns.fuzz_tokenizer import TokenizerFile

    return TokenizerFile()


def _model_folder() -> Kind:
    from campaigns.fuzz_model import ModelFolder

    return ModelFolder()


def _checkpoint() -> Kind:
    from campaigns.fuzz_checkpoint import CheckpointFolder

    return CheckpointFolder()


KINDS: dict[str, Callable[[], Kind]] = {
    "config_file": _config_file,
    "command_line": _command_line,
    "prepared_set": _prepared_set,
    "corpus_file": _corpus_file,
    "tokenizer": _tokenizer,
    "model_folder": _model_folder,
    "checkpoint": _checkpoint,
}
