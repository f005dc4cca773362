"""Checks that the data and the settings of a run fit its task and model family. Imports no JAX."""

from typing import TYPE_CHECKING, Any

from tjx_core import Problem, unknown_name
from tjx_data.config import DataConfig
from tjx_data.conversations.config import ChatConfig
from tjx_data.corpora.registry import OTHER_DATA
from tjx_nn.lora_config import LoRAConfig
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_parallel.config import MeshConfig
from tjx_rl.config import RLConfig
from tjx_trainer.config.distill_config import DistillConfig
from tjx_trainer.config.train_config import TrainConfig, next_multiple
from tjx_trainer.extensions import registered_tasks

if TYPE_CHECKING:
    from tjx_trainer.config.run_config import ModelConfig

# Tasks whose loss is a function of the log-probabilities of responses.
RL_TASKS = ("grpo", "dpo", "kto")
_KEYS = {  # of a line of ``data.path``
    "grpo": "prompt and answer",
    "dpo": "prompt, chosen and rejected",
    "kto": "prompt, completion and label",
}
# Built-in tasks that ``task`` selects; the others follow from the model family.
NAMED_TASKS = ("sft", *RL_TASKS)
# Families with a task of their own; subclasses read the same data.
_BUILT_IN: tuple[type, ...] = (GPTConfig, BertConfig, ViTConfig, EncoderDecoderConfig)


def check_task(task: str | None, model: "ModelConfig") -> list[Problem]:
    """Check that the task is known, and that an own model family has one."""
    if task is None:
        if isinstance(model, _BUILT_IN):
            return []
        message = f"got none with model.family {model.family}; expected a registered task; give one"
        return [Problem("task", message, ("model.family",))]
    if task in (*NAMED_TASKS, *registered_tasks):
        return []
    register = "tjx_trainer.extensions.register_task"
    return [
        unknown_name("task", task, ["none", *NAMED_TASKS, *registered_tasks], register=register)
    ]


def check_data(task: str | None, data: DataConfig, model: "ModelConfig") -> list[Problem]:
    """Check that the corpus is of the kind that the model family reads."""
    if task is not None or is_byte_reversal(data, model):
        return []
    related = ("model.family", "data.path")
    if data.reads_tokens and not isinstance(model, GPTConfig):
        message = (
            f"got {data.path}, token ids; expected text or images for model.family {model.family}; "
            "token ids are for model.family gpt"
        )
        return [Problem("data.path", message, ("model.family",))]
    if not isinstance(model, ViTConfig):
        if data.corpus not in OTHER_DATA or data.path is not None:
            return []
        message = (
            f"got {data.corpus} ({OTHER_DATA[data.corpus]}); expected text for model.family "
            f"{model.family}; give a text corpus"
        )
    elif data.corpus not in ("images", "mnist"):
        message = (
            f"got {data.corpus}; expected images for model.family vit; give --data.corpus images "
            f"({OTHER_DATA['images']})"
        )
    elif data.path is None:
        message = f"got none; give --data.path FOLDER ({OTHER_DATA[data.corpus]})"
        return [Problem("data.path", message, ("data.corpus",))]
    else:
        return []
    return [Problem("data.corpus", message, related)]


_TEXT_FAMILIES: tuple[Any, ...] = (GPTConfig, BertConfig, EncoderDecoderConfig)
# Data options that only some model families use.
_FAMILIES_OF_OPTION: dict[str, tuple[Any, ...]] = {
    "whole_words": (BertConfig,), "resize": (ViTConfig,), "augment": (ViTConfig,),
    "stream": (GPTConfig,), "mixture": _TEXT_FAMILIES, "packing": _TEXT_FAMILIES,
}  # fmt: skip


def check_data_options(task: str | None, data: DataConfig, model: "ModelConfig") -> list[Problem]:
    """Check that the model family uses the data options that are set."""
    if task is not None:
        return []
    default = DataConfig()
    return [
        Problem(
            f"data.{name}",
            f"got {getattr(data, name)} with model.family {model.family}; expected "
            f"{' or '.join(kind.family for kind in families)}; leave it out",
            ("model.family",),
        )
        for name, families in _FAMILIES_OF_OPTION.items()
        if getattr(data, name) != getattr(default, name) and not isinstance(model, families)
    ]


def is_byte_reversal(data: DataConfig, model: "ModelConfig") -> bool:
    """Return whether a run trains on the synthetic byte-reversal task."""
    return (
        isinstance(model, EncoderDecoderConfig)
        and data.corpus == "byte-reversal"
        and data.path is None
        and data.mixture is None
    )


def check_conversations(
    task: str | None, data: DataConfig, chat: ChatConfig, model: "ModelConfig"
) -> list[Problem]:
    """Check the sections that the task sft reads, and that no other task has its options."""
    if task != "sft":
        if chat == ChatConfig() or (task is not None and task not in RL_TASKS):
            return []
        message = (
            f"got one with task {task or 'none'}; expected --task sft; give it, or leave --chat.* "
            "out"
        )
        return [Problem("chat", message, ("task",))]
    problems = []
    if not isinstance(model, GPTConfig):
        message = f"got {model.family} with task {task}; expected gpt; leave it out"
        problems.append(Problem("model.family", message, ("task",)))
    if data.path is None and data.corpus != "tiny-chat":
        message = (
            f"got none with task {task}; expected conversations: --data.path FILE.jsonl, or "
            "--data.corpus tiny-chat"
        )
        problems.append(Problem("data.path", message, ("task",)))
    if data.tokenizer_kind in ("bpe", "char"):
        message = (
            f"got {data.tokenizer} with task {task}; expected a trained tokenizer: a "
            "tokenizer.json, a folder, gpt2 or byte; that of --train.init_from is the default"
        )
        problems.append(Problem("data.tokenizer", message, ("task",)))
    for name in ("mixture", "packing", "windows", "holdout"):
        if getattr(data, name) != getattr(DataConfig(), name):
            message = f"got {getattr(data, name)} with task {task}, which ignores it; leave it out"
            problems.append(Problem(f"data.{name}", message, ("task",)))
    return problems


def check_lora(
    lora: LoRAConfig, model: "ModelConfig", train: TrainConfig, mesh: MeshConfig
) -> list[Problem]:
    """Check the options that adapters do not support."""
    if lora.rank is None:
        unused = [name for name in ("alpha", "targets", "dora", "base_dtype")
                  if getattr(lora, name) != getattr(LoRAConfig(), name)]  # fmt: skip
        message = "got one without lora.rank; expected both; give --lora.rank 8"
        return [Problem(f"lora.{name}", message, ("lora.rank",)) for name in unused]
    refused = {
        "mesh.stage": (mesh.stage, 1),
        "train.reproducible": (train.reproducible, "none"),
        "model.mup_base": (model.mup_base, None),
    }
    return [
        Problem(
            name,
            f"got {given} with lora.rank {lora.rank}; expected "
            f"{'none' if value is None else value}; leave it out",
            ("lora.rank",),
        )
        for name, (given, value) in refused.items()
        if given != value
    ]


def check_layer_rates(lora: LoRAConfig, model: "ModelConfig", train: TrainConfig) -> list[Problem]:
    """Check that layer-wise learning rates fit the model."""
    rates = {"freeze_layers": (train.freeze_layers, 0), "layer_decay": (train.layer_decay, 1)}
    rule = None
    if model.family != "gpt":
        rule = "a decoder"
    elif lora.rank is not None:
        rule = "no adapters, whose base is not trained"
    problems = [
        Problem(
            f"train.{name}",
            f"got {value} with model.family {model.family} and lora.rank {lora.rank}; expected "
            f"{rule}; leave it out",
            ("model.family", "lora.rank"),
        )
        for name, (value, default) in rates.items()
        if rule is not None and value != default
    ]
    if train.freeze_layers > model.n_layer:
        message = f"got {train.freeze_layers}; expected at most model.n_layer, {model.n_layer}"
        problems.append(Problem("train.freeze_layers", message, ("model.n_layer",)))
    return problems


def check_distill(
    task: str | None, distill: DistillConfig, rl: RLConfig, model: "ModelConfig",
    train: TrainConfig, mesh: MeshConfig,
) -> list[Problem]:  # fmt: skip
    """Check that the settings of a run fit a teacher."""
    if distill.teacher is None:
        return []
    rules = {
        ("model.family", model.family): "gpt",
        ("mesh.stage", mesh.stage): 1,
        ("train.reproducible", train.reproducible): "none",
    }
    problems = [
        Problem(name, f"got {value} with distill.teacher; expected {rule}; leave one of them out",
                ("distill.teacher",))
        for (name, value), rule in rules.items()
        if value != rule
    ]  # fmt: skip
    if task not in (None, "sft", "grpo"):
        message = f"got {task} with distill.teacher; expected none, sft or grpo; leave one out"
        problems.append(Problem("task", message, ("distill.teacher",)))
    if task == "grpo" and distill.temperature != 1:
        message = f"got {distill.temperature} with task grpo; expected 1; leave it out"
        problems.append(Problem("distill.temperature", message, ("task",)))
    if task == "grpo" and rl.skip_equal_groups:
        message = "got True with distill.teacher, which compares all responses; expected False"
        problems.append(Problem("rl.skip_equal_groups", message, ("distill.teacher",)))
    return problems


def check_rl(
    task: str | None, rl: RLConfig, data: DataConfig, model: "ModelConfig", train: TrainConfig,
    mesh: MeshConfig,
) -> list[Problem]:  # fmt: skip
    """Check that the settings of a run fit the tasks grpo, dpo and kto."""
    if task not in RL_TASKS:
        if rl == RLConfig():
            return []
        message = (
            f"got settings with task {task or 'none'}; expected task {', '.join(RL_TASKS[:-1])} or "
            f"{RL_TASKS[-1]}; give --task or leave them out"
        )
        return [Problem("rl", message, ("task",))]
    rules = {
        ("model.family", model.family): "gpt",
        ("mesh.stage", mesh.stage): 1,
        ("mesh.context", mesh.context): 1,
        # It would raise the probability of every response, also of the rejected ones.
        ("model.multi_token_loss", getattr(model, "multi_token_loss", 0)): 0,
        ("train.reproducible", train.reproducible): "none",
    }
    problems = [
        Problem(name, f"got {value} with task {task}; expected {rule}; leave it out", ("task",))
        for (name, value), rule in rules.items()
        if value != rule
    ]
    if data.path is None and (task != "grpo" or data.corpus not in ("arithmetic", "tiny-chat")):
        keys = _KEYS[task]
        builtin = ", or --data.corpus arithmetic or tiny-chat" if task == "grpo" else ""
        message = f"got none with task {task}; expected a .jsonl file with {keys} a line{builtin}"
        problems.append(Problem("data.path", message, ("task",)))
    if train.init_from is None and (task != "grpo" or data.path is not None):
        message = f"got none with task {task}; expected the model to start from; give a folder"
        problems.append(Problem("train.init_from", message, ("task",)))
    if rl.chat and (task != "grpo" or train.init_from is None):
        message = (
            f"got true with task {task} and train.init_from {train.init_from}; expected task grpo "
            "and a model with a chat template; change one of them"
        )
        problems.append(Problem("rl.chat", message, ("task", "train.init_from")))
    divisors = {"rl.samples_per_prompt": rl.samples_per_prompt, "rl.minibatches": rl.minibatches}
    for name, divisor in divisors.items() if task == "grpo" else ():
        multiple = divisor * (train.accumulation or 1 if name == "rl.minibatches" else 1)
        if train.batch_size % multiple:
            message = (
                f"got {train.batch_size}; expected a multiple of {name}={divisor}"
                f"{'' if multiple == divisor else ' times train.accumulation'}; give "
                f"--train.batch_size {next_multiple(train.batch_size, multiple)}"
            )
            problems.append(Problem("train.batch_size", message, (name,)))
    if task != "grpo" and rl.updates_per_rollout > 1:
        message = f"got {rl.updates_per_rollout} updates with task {task}; expected 1; leave it out"
        problems.append(Problem("rl.minibatches", message, ("task", "rl.epochs")))
    if task == "kto" and train.batch_size < 2:
        message = (
            f"got {train.batch_size} with task kto; expected at least 2, as the reference point is "
            "of the responses to other prompts of the batch; give a larger --train.batch_size"
        )
        problems.append(Problem("train.batch_size", message, ("task",)))
    if task == "grpo" and rl.max_new_tokens >= data.seq_len:
        message = (
            f"got {rl.max_new_tokens}; expected fewer than data.seq_len={data.seq_len}, the tokens "
            "of prompt and response; give a longer --data.seq_len"
        )
        problems.append(Problem("rl.max_new_tokens", message, ("data.seq_len",)))
    return problems
