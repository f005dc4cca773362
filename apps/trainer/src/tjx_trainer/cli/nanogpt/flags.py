"""Flags of nanoGPT's train.py, and their translation to configuration values.

https://github.com/karpathy/nanoGPT, `train.py` and `model.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tjx_data.corpora.registry import CORPORA
from tjx_trainer.cli.nanogpt.config_files import Value

Values = Mapping[str, Any]

GPT2_SIZES: Mapping[str, Mapping[str, int]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
INIT_FROM = ("scratch", "resume", *GPT2_SIZES)
GPT2_CONTEXT = 1024  # tokens
NANOGPT_VOCAB_SIZE = 50304  # of train.py for GPT-2's tokens: 50,257 rounded up to 64

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Flag:
    """One flag of train.py.

    Attributes
    ----------
    default : bool, int, float or str
        Default in train.py.
    becomes : tuple of str
        Configuration fields that follow from it, by dotted name.
    about : str
        Meaning here, for the table in the documentation.
    note : str
        Note to print when it is given and has less effect than in train.py.
    """

    default: Value
    becomes: tuple[str, ...]
    about: str
    note: str = ""


_SCHEDULE = ("schedule.name", "schedule.warmup_steps", "schedule.decay_steps")
_BATCH = ("train.batch_size", "train.device_batch_size", "train.eval_tokens")

FLAGS: Mapping[str, Flag] = {
    "out_dir": Flag("out", ("run_dir",), "the run directory"),
    "eval_interval": Flag(
        2000, ("train.eval_every", "checkpoint.every"), "steps between evaluations, and saves"
    ),
    "log_interval": Flag(1, ("log.every",), "steps between records of metrics"),
    "eval_iters": Flag(
        200,
        ("train.eval_tokens",),
        "at most eval_iters x batch_size x block_size validation tokens, the same in each "
        "evaluation; nanoGPT draws random batches. The training loss is that of the steps",
    ),
    "eval_only": Flag(
        False,
        (),
        "true: evaluate the initial parameters without training; evaluate a run by `loss` of "
        "apps/eval",
    ),
    "always_save_checkpoint": Flag(
        True,
        ("checkpoint.keep", "checkpoint.keep_best"),
        "false: keep the best checkpoint, and the newest to resume from",
    ),
    "init_from": Flag(
        "scratch",
        ("train.init_from", "model.activation", "model.vocab_size"),
        "`scratch`; `resume` resumes the run in out_dir exactly; `gpt2*` loads OpenAI's weights "
        "from the hub, whose sizes replace n_layer, n_head, n_embd and bias",
    ),
    "wandb_log": Flag(
        False, ("log.trackers",), "Weights & Biases, in addition to metrics.jsonl"
    ),
    "wandb_project": Flag("owt", ("log.project",), "its project"),
    "wandb_run_name": Flag("gpt2", ("name",), "the run's name"),
    "dataset": Flag(
        "openwebtext",
        ("data.corpus", "data.path", "data.tokenizer", "data.holdout", "data.holdout_fraction",
         "model.vocab_multiple", "model.vocab_size"),
        "`data/NAME/train.bin` and `val.bin` if they exist (50,304 ids as in train.py; with a "
        "`meta.pkl`, which is never read, give `--model.vocab_size`; for `_char` with an input.txt "
        "the text), else `data/NAME/input.txt`, else the corpus of this name (`shakespeare`, "
        "`openwebtext`, or another of tjx); characters if the name ends in `_char`, otherwise "
        "GPT-2's tokens; the validation fraction is that of prepare.py",
    ),
    "gradient_accumulation_steps": Flag(
        40, ("train.batch_size",), "micro-batches of a step, over all devices"
    ),
    "batch_size": Flag(
        12,
        _BATCH,
        "sequences of a micro-batch on one device: a step has batch_size x "
        "gradient_accumulation_steps of them, on any number of devices",
    ),
    "block_size": Flag(
        1024, ("data.seq_len", "model.max_seq_len", "train.eval_tokens"), "tokens of a sequence"
    ),
    "n_layer": Flag(12, ("model.n_layer",), "blocks"),
    "n_head": Flag(12, ("model.n_head",), "heads"),
    "n_embd": Flag(768, ("model.d_model",), "features of the residual stream"),
    "dropout": Flag(
        0.0, ("model.dropout", "model.attention_dropout"), "of embeddings, sublayers and attention"
    ),
    "bias": Flag(False, ("model.bias",), "whether linear layers and norms have biases"),
    "learning_rate": Flag(
        6e-4, ("optimizer.learning_rate", "schedule.final_fraction"), "the peak"
    ),
    "max_iters": Flag(
        600000,
        ("train.max_steps",),
        "steps; train.py does one more, which it neither evaluates nor saves",
    ),
    "weight_decay": Flag(
        0.1, ("optimizer.weight_decay",), "of matrices and embeddings, not of biases and norms"
    ),
    "beta1": Flag(0.9, ("optimizer.b1",), "AdamW's"),
    "beta2": Flag(0.95, ("optimizer.b2",), "AdamW's"),
    "grad_clip": Flag(1.0, ("optimizer.clip_norm",), "largest norm of the gradient; 0 is none"),
    "decay_lr": Flag(
        True,
        (*_SCHEDULE, "schedule.final_fraction"),
        "false: a constant rate without warm-up",
    ),
    "warmup_iters": Flag(2000, ("schedule.warmup_steps",), "steps of the warm-up"),
    "lr_decay_iters": Flag(
        600000, ("schedule.decay_steps",), "the step at which the cosine ends"
    ),
    "min_lr": Flag(6e-5, ("schedule.final_fraction",), "the final rate"),
    "backend": Flag(
        "nccl", (), "no effect", "JAX has its own communication; see --distributed.*; ignored"
    ),
    "device": Flag(
        "cuda",
        ("train.precision",),
        "`cpu`, `cuda` for all GPUs, or `cuda:1` for one; by default JAX decides",
    ),
    "dtype": Flag(
        "bfloat16",
        ("train.precision",),
        "compute precision; always float32 on a CPU, as in train.py",
    ),
    "compile": Flag(True, (), "no effect", "tjx always compiles; ignored"),
}  # fmt: skip


def to_config_values(values: Values) -> dict[str, Any]:
    """Translate a value for each flag of train.py to configuration values by dotted name.

    `init_from` and `out_dir` are translated without reading files.
    """
    given = GPT2_SIZES.get(values["init_from"])
    sizes = values if given is None else {**values, **given, "bias": True}
    sequences = values["batch_size"] * values["gradient_accumulation_steps"]
    return {
        "name": values["wandb_run_name"],
        "run_dir": values["out_dir"],
        "seed": 1337,
        "log.every": values["log_interval"],
        "log.trackers": ("wandb",) if values["wandb_log"] else (),
        "log.project": values["wandb_project"],
        "checkpoint.every": values["eval_interval"],
        "checkpoint.keep": 3 if values["always_save_checkpoint"] else 1,
        "checkpoint.keep_best": 0 if values["always_save_checkpoint"] else 1,
        "train.eval_every": values["eval_interval"],
        "train.eval_tokens": values["eval_iters"] * values["batch_size"] * values["block_size"],
        "train.max_steps": values["max_iters"],
        "train.batch_size": sequences,
        "train.device_batch_size": values["batch_size"],
        "train.precision": precision(values),
        "train.init_from": None if given is None else f"openai-community/{values['init_from']}",
        "model.n_layer": sizes["n_layer"],
        "model.n_head": sizes["n_head"],
        "model.d_model": sizes["n_embd"],
        "model.bias": sizes["bias"],
        "model.max_seq_len": values["block_size"],
        "model.dropout": values["dropout"],
        "model.attention_dropout": values["dropout"],
        # GPT-2 was trained with the tanh approximation of GELU; nanoGPT computes the exact GELU.
        "model.activation": "gelu_erf" if given is None else "gelu_tanh",
        "optimizer.name": "adamw",
        "optimizer.learning_rate": values["learning_rate"],
        "optimizer.weight_decay": values["weight_decay"],
        "optimizer.b1": values["beta1"],
        "optimizer.b2": values["beta2"],
        "optimizer.clip_norm": values["grad_clip"] or None,
        **_schedule(values),
        **_data(values),
    }


def precision(values: Values) -> str:
    """Return the compute precision; on a CPU always float32."""
    return "fp32" if values["device"] == "cpu" else PRECISIONS[values["dtype"]]


def _schedule(values: Values) -> dict[str, Any]:
    if not values["decay_lr"]:
        return {"schedule.name": "constant", "schedule.warmup_steps": 0}
    peak = values["learning_rate"]
    return {
        "schedule.name": "cosine",
        "schedule.warmup_steps": values["warmup_iters"],
        "schedule.decay_steps": values["lr_decay_iters"],
        "schedule.final_fraction": values["min_lr"] / peak if peak else 0.0,
    }


def input_file(dataset: str) -> Path:
    """Return the file to which prepare.py writes the text of a data set."""
    return Path("data") / dataset / "input.txt"


def has_token_files(dataset: str) -> bool:
    """Return whether the train.bin and val.bin of prepare.py are read.

    For characters the text is preferred: its characters need no meta.pkl.
    """
    folder, is_char = input_file(dataset).parent, dataset.endswith("_char")
    if is_char and input_file(dataset).is_file():
        return False
    return all((folder / name).is_file() for name in ("train.bin", "val.bin"))


def corpus_of(dataset: str) -> str:
    """Return the corpus name of a data set; the corpus need not exist."""
    return dataset.removesuffix("_char")


def _data(values: Values) -> dict[str, Any]:
    dataset, path = values["dataset"], input_file(values["dataset"])
    is_char = dataset.endswith("_char")
    if has_token_files(dataset):
        tokens = {
            "data.seq_len": values["block_size"],
            "data.path": str(path.parent),
            "data.tokenizer": "auto",
            "model.vocab_multiple": 1,
        }
        # As in train.py: 50,304 without a meta.pkl, which is not read as it could run code.
        has_meta = (path.parent / "meta.pkl").exists()
        return tokens if has_meta else tokens | {"model.vocab_size": NANOGPT_VOCAB_SIZE}
    is_one_text = path.is_file() or corpus_of(dataset) == "shakespeare"
    found: dict[str, Any] = {
        "data.seq_len": values["block_size"],
        "data.tokenizer": "char" if is_char else "gpt2",
        # As in prepare.py: the last tenth of a single text, 0.05 % of OpenWebText's documents.
        "data.holdout": "tail" if is_one_text else "documents",
        "data.holdout_fraction": 0.1 if is_one_text else 0.0005,
        # 50,304 rows for GPT-2's 50,257 tokens.
        "model.vocab_multiple": 1 if is_char else 64,
    }
    if path.is_file():
        return found | {"data.path": str(path)}
    return found | {"data.corpus": corpus_of(dataset) if corpus_of(dataset) in CORPORA else ""}


def from_config_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a saved run, as far as they depend on each other.

    Parameters
    ----------
    config : mapping
        The run's values by dotted name.
    """
    piece = config["train.device_batch_size"] or config["train.batch_size"]
    length = config["data.seq_len"]
    peak = config["optimizer.learning_rate"]
    dtype = next(d for d, p in PRECISIONS.items() if p == config["train.precision"])
    return {
        "batch_size": piece,
        "gradient_accumulation_steps": config["train.batch_size"] // piece,
        "block_size": length,
        "eval_iters": (config["train.eval_tokens"] or 0) // (piece * length),
        "eval_interval": config["train.eval_every"],
        "log_interval": config["log.every"],
        "wandb_log": "wandb" in config["log.trackers"],
        "wandb_project": config["log.project"],
        "wandb_run_name": config["name"],
        "always_save_checkpoint": not config["checkpoint.keep_best"],
        "learning_rate": peak,
        "min_lr": config["schedule.final_fraction"] * peak,
        "warmup_iters": config["schedule.warmup_steps"],
        "lr_decay_iters": config["schedule.decay_steps"] or config["train.max_steps"],
        "decay_lr": config["schedule.name"] != "constant",
        "max_iters": config["train.max_steps"],
        "weight_decay": config["optimizer.weight_decay"],
        "beta1": config["optimizer.b1"],
        "beta2": config["optimizer.b2"],
        "grad_clip": config["optimizer.clip_norm"] or 0.0,
        "dropout": config["model.dropout"],
        "dtype": dtype,
    }


def table() -> list[str]:
    """Return the table of flags as Markdown, for docs/nanogpt.md."""
    lines = ["| flag | train.py's default | sets | meaning |", "|---|---|---|---|"]
    for name, flag in FLAGS.items():
        becomes = ", ".join(f"`{one}`" for one in flag.becomes) or "-"
        meaning = f"{flag.about}: {flag.note}" if flag.note else flag.about
        lines.append(f"| `--{name}` | `{flag.default}` | {becomes} | {meaning} |")
    return lines
