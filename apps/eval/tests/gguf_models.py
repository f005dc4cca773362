"""Small models with random weights and real tokenizers, exported to GGUF for llama.cpp.

python gguf_models.py FOLDER writes the files that tools/golden/make_gguf_golden.py reads. Their
bytes are the same on every machine.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers

from tjx_data import CHAT_TOKENS, ChatTemplate, Tokenizer, byte_tokenizer
from tjx_eval.export.gguf import export_gguf
from tjx_eval.export.gguf_file import Dtype
from tjx_eval.export.gguf_tokenizer import SPLITTINGS
from tjx_eval.load_model import TrainedModel
from tjx_nn import GPTConfig, init
from tjx_nn.sub_configs import RopeConfig

# What the splittings of words treat differently: digits, contractions, white space, punctuation.
TEXTS = [
    "It's 2026: they'll say I'M 1234567 or 12 345,67...\n\n\n  (don't) THEY'RE\r\n\r\n end",
    "x = [1, 22, 333]  # comment\n\tif x:\n\t\treturn  x  \n \n!?\n.. !!\n'S'Ve",
    "naïve Ünïcode été ²³½ ٣٤٥ 日本語の文章。 \u00a0nbsp\u3000wide ☃☃ 👍🏽 e\u0301\u200b!",
    "",
]
MESSAGES = [
    {"role": "user", "content": "12 sheep"},
    {"role": "assistant", "content": "more"},
    {"role": "user", "content": "13"},
]
_LLAMA: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64, "d_ff": 96, "max_seq_len": 128,
    "positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
}  # fmt: skip
_LLAMA3_ROPE = RopeConfig(base=1000.0, scaling="llama3", factor=4.0, original_seq_len=32)


class Case(NamedTuple):
    """An exported model: fields of its config, its splitting of words, and the stored dtype.

    The last one is the name of a built-in chat template.
    """

    fields: dict[str, Any]
    splitting: str
    dtype: Dtype
    template: str | None = None


CASES = {
    "llama": Case({**_LLAMA, "rope": _LLAMA3_ROPE, "tied_head": False}, "llama-bpe", "f16", "tjx"),
    "llama_bias": Case(
        {**_LLAMA, "bias": True, "tokenizer_size": 455, "tied_head": False}, "gpt-2", "f32"
    ),
    "llama_q8_0": Case({**_LLAMA, "d_ff": 80, "tied_head": False}, "smollm", "q8_0"),
    "qwen2": Case(
        {**_LLAMA, "qkv_bias": True, "rope": RopeConfig(scaling="linear", factor=2.0)},
        "qwen2",
        "f16",
        "plain",
    ),
    "qwen3": Case({**_LLAMA, "qk_norm": True, "d_head": 32, "tied_head": False}, "qwen2", "f16"),
    "gpt2": Case({"n_layer": 2, "n_head": 4, "d_model": 64, "max_seq_len": 128}, "bytes", "f16"),
}


def make_tokenizer(splitting: str) -> Tokenizer:
    """Return a tokenizer of 455 ids with merges across words, so that each splitting matters.

    The splitting "bytes" is the tokenizer of 256 bytes.
    """
    if splitting == "bytes":
        return byte_tokenizer()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=449,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text[i:] for text in TEXTS for i in range(0, 20, 3)] * 2, trainer)
    inner.add_special_tokens(["<|endoftext|>", *CHAT_TOKENS])
    description = json.loads(inner.to_str())
    steps, ignore_merges = SPLITTINGS[splitting]
    steps = [
        step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step for step in steps
    ]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    description["model"]["ignore_merges"] = ignore_merges
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)))


def make_params(config: GPTConfig) -> dict[str, Any]:
    """Return random parameters with which greedy tokens vary."""
    bits = np.random.PCG64(13)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        kind = path[-1].key
        uniform: np.ndarray = (bits.random_raw(leaf.size) >> np.uint64(40)).astype(
            np.float32
        ) / 2**23 - 1
        values = uniform.reshape(leaf.shape)
        if kind == "kernel":
            return values * np.float32((6 / leaf.shape[-2]) ** 0.5)
        return 1 + values / 2 if kind == "scale" else values / 2

    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    filled: dict[str, Any] = jax.tree.map_with_path(fill, shapes)
    return filled


def make_model(case: Case, folder: Path) -> TrainedModel:
    """Return a model; its chat template is written to the folder."""
    config = GPTConfig(**{"vocab_size": 480, **case.fields})
    tokenizer = make_tokenizer(case.splitting)
    if case.template is not None:
        folder.mkdir(parents=True, exist_ok=True)
        ChatTemplate.built_in(case.template, tokenizer).save(folder)
    return TrainedModel(
        path=folder,
        architecture=config,
        params=make_params(config),
        mesh=jax.sharding.Mesh(jax.devices()[:1], "data"),
        text_tokenizer=tokenizer,
    )


def export(name: str, folder: Path) -> tuple[TrainedModel, Path]:
    """Export the model of a case; return it and the file."""
    model, out = make_model(CASES[name], folder / name), folder / f"{name}.gguf"
    with out.open("wb") as file:
        export_gguf(model, file, dtype=CASES[name].dtype)
    return model, out


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    (target / "inputs.json").write_text(json.dumps({"texts": TEXTS, "messages": MESSAGES}))
    for each in CASES:
        export(each, target)
