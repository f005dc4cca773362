"""Agreement with Hugging Face transformers on checkpoints loaded by `tjx_nn.hf`.

The folders are made by `tools/golden/make_hf_golden.py`; `tools/golden/golden_table.py` prints the
deviations that the tests record.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
import pytest

from tjx_nn import EncoderDecoderConfig, GPTConfig, bind, generate, hf
from tjx_nn.binding import Params
from tjx_nn.config import Activation
from tjx_nn.hf.families import BUILT_IN

Golden = dict[str, np.ndarray]
Record = Callable[[str, object], None]

GOLDEN = pathlib.Path(__file__).parent / "golden"
SEQ2SEQ = ["bart", "t5", "t5_v1_1", "mt5"]
# Positional and keyword arguments of each model that is no decoder.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bert": (("tokens",), ("token_types", "mask")),
    "vit": (("images",), ()),
    "dinov2": (("images",), ()),
    "dinov2_registers": (("images",), ()),
    "siglip": (("images",), ()),
    "roberta": (("tokens",), ("mask",)),
    "modernbert": (("tokens",), ("mask",)),
    **dict.fromkeys(SEQ2SEQ, (("source", "tokens"), ("source_mask",))),
}
# Vision encoders without a head, which `test_nn_vision_golden.py` tests.
BACKBONES = ["dinov2_backbone", "dinov2_registers_backbone", "siglip_vision"]
HALF: Literal["bfloat16"] = "bfloat16"
DECODERS = [
    "llama", "llama3_rope", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2",
    "phi3", "mixtral", "qwen3_moe", "gpt_neox", "starcoder2",
    "deepseek_v2", "deepseek_v3", "smollm3", "granite", "cohere", "cohere2", "olmo3",
    "gpt_oss", "llama4",
]  # fmt: skip


def golden(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as file:
        return dict(file)


GENERATIVE = ["gpt2", *DECODERS, *SEQ2SEQ]


def test_every_family_has_golden_results() -> None:
    found: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(GOLDEN.glob("*/config.json")):
        config = json.loads(path.read_text())
        found.setdefault((config["model_type"], *config["architectures"]), []).append(
            path.parent.name
        )
    families = {(family.model_type, family.architecture): family for family in BUILT_IN}
    assert families.keys() == found.keys()
    for key, family in families.items():
        of_kind = [*DECODERS, "gpt2"] if family.config is GPTConfig else [*ARGUMENTS, *BACKBONES]
        name = next(each for each in found[key] if each in of_kind)
        columns = {"logits", "loss", "gradient_norm", "bfloat16_logits"}
        if name in BACKBONES:
            columns = {"features", "pooled", "bfloat16_features", "bfloat16_pooled"}
        elif family.config in (GPTConfig, EncoderDecoderConfig):
            columns.add("greedy")
            assert name in GENERATIVE
        given = {array.removeprefix("tanh/") for array in golden(name)}
        assert columns <= given, f"{name}: got {sorted(given)}; expected {sorted(columns)}"


def partly_slow(*fast: str, of: Sequence[str]) -> list[Any]:
    """Parameters of a test of models that runs nightly except for a few."""
    return [pytest.param(x, marks=[] if x in fast else pytest.mark.slow) for x in of]


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_logits(
    config: Any, name: str, params: Params, given: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    model: Any = bind(config, params)
    if name not in ARGUMENTS:  # without the capacity and the losses of experts
        tokens = given["tokens"]
        x, _ = model.run_blocks(model.embed_tokens(tokens), tokens, drop_tokens=False)
        logits = model.logits(x if model.ln_f is None else model.ln_f(x))
        return model.token_losses(x[:, :-1], tokens[:, 1:])[0].mean(), logits
    names, keywords = ARGUMENTS[name]
    positional, keyword = [given[each] for each in names], {each: given[each] for each in keywords}
    losses = model.losses(*positional, given["labels"], **keyword).tokens
    return losses.sum() / (given["labels"] >= 0).sum(), model(*positional, **keyword)


def inputs(name: str, arrays: Golden) -> Golden:
    names, keywords = ARGUMENTS.get(name, (("tokens",), ()))
    labels = ["labels"] if name in ARGUMENTS else []
    return {each: arrays[each] for each in (*names, *keywords, *labels)}


def seen(arrays: Golden) -> Any:
    """Index of defined outputs: not those at padding."""
    return arrays["mask"] > 0 if "mask" in arrays else ...


def largest(x: Any, y: Any) -> str:
    return f"{np.abs(x - y).max():.1e}"


@pytest.mark.parametrize("name", [*DECODERS, *ARGUMENTS])
def test_logits_and_loss_agree_with_transformers(name: str, record: Record) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    given = jax.device_put((params, inputs(name, arrays)))
    loss, logits = jax.device_get(loss_and_logits(config, name, *given))
    logits, expected = logits[seen(arrays)], arrays["logits"][seen(arrays)]
    record(f"{name}: logits", largest(logits, expected))
    record(f"{name}: loss", largest(loss, arrays["loss"]))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    partly_slow(
        "gemma3", "olmo2", "gpt_neox", "deepseek_v3", "gpt_oss", "modernbert", "bart", "t5_v1_1",
        of=[*DECODERS, *ARGUMENTS],
    ),
)  # fmt: skip
def test_gradients_agree_with_transformers(name: str, record: Record) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)

    @jax.jit
    def compute(params: Params, given: dict[str, jax.Array]) -> Any:
        gradients = jax.grad(lambda p: loss_and_logits(config, name, p, given)[0])(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        return sum(jax.tree.leaves(squares)) ** 0.5

    norm = jax.device_get(compute(*jax.device_put((params, inputs(name, arrays)))))
    expected = arrays["gradient_norm"]
    record(f"{name}: gradient norm", f"{abs(norm / expected - 1):.1e}")
    np.testing.assert_allclose(norm, expected, rtol=1e-5)


# Largest root mean square error of bfloat16 logits, as a multiple of that of transformers.
MOST_BFLOAT16_ERROR = 1.5


@pytest.mark.parametrize(("kind", "length"), [("short", 8), ("long", 36)])
def test_longrope_agrees_with_transformers_up_to_and_beyond_the_original_length(
    kind: str, length: int, record: Record
) -> None:
    read, params = hf.load(GOLDEN / "phi3_longrope")
    assert isinstance(read, GPTConfig)
    assert (read.max_seq_len, read.longest_seq_len) == (8, 36)
    config = dataclasses.replace(read, max_seq_len=length)
    arrays = golden("phi3_longrope")
    run = functools.partial(loss_and_logits, config, "phi3_longrope", jax.device_put(params))
    tokens, expected = arrays["tokens"], arrays["logits"]
    if kind == "short":
        tokens, expected = tokens[:, :8], arrays["short/logits"]
        with pytest.raises(ValueError, match="16 tokens; expected at most max_seq_len 8"):
            run(jax.device_put({"tokens": arrays["tokens"]}))
    _, found = jax.device_get(run(jax.device_put({"tokens": tokens})))
    record("phi3_longrope: logits", largest(found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    greedy = arrays[f"{kind}/greedy"]
    start = {"short": 4, "long": 9}[kind]
    given = jax.device_put((params, tokens[:, :start], np.array([start, start], np.int32)))
    new = generate(config, *given, max_new_tokens=greedy.shape[1], temperature=0.0)
    equal = (jax.device_get(new) == greedy).all(0).sum()
    record("phi3_longrope: greedy", f"{equal} of {greedy.shape[1]}")
    np.testing.assert_array_equal(new, greedy)


@pytest.mark.parametrize(
    "name",
    partly_slow("gemma3", "mixtral", "gpt_oss", "bart", of=["gpt2", *DECODERS, *ARGUMENTS]),
)
def test_bfloat16_logits_are_as_exact_as_those_of_transformers(name: str, record: Record) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    half = dataclasses.replace(config, dtype=HALF)
    given = jax.device_put((params, inputs(name, arrays)))
    _, found = jax.device_get(loss_and_logits(half, name, *given))
    theirs = arrays["bfloat16_logits"].view(HALF).astype(np.float32)
    exact = arrays["tanh/logits" if name == "gpt2" else "logits"]
    ours, allowed = (np.square((x - exact)[seen(arrays)]).mean() ** 0.5 for x in (found, theirs))
    record(f"{name}: bfloat16", f"{ours / allowed:.2f}")
    assert ours <= MOST_BFLOAT16_ERROR * allowed
    assert ours > 1e-3  # it computes in bfloat16


@pytest.mark.parametrize(
    "name", partly_slow("gemma3", "mixtral", "gpt_oss", "bart", "t5", of=GENERATIVE)
)
def test_greedy_tokens_agree_with_transformers(name: str, record: Record) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    rows, new = arrays["greedy"].shape
    prompt = arrays["tokens"][:, :4]
    sources: dict[str, Any] = {}
    if isinstance(config, EncoderDecoderConfig):
        prompt = np.full((rows, 1), config.start_id, np.int32)
        sources = {each: arrays[each] for each in ("source", "source_mask")}
    else:
        assert isinstance(config, GPTConfig)
    lengths = np.full(rows, prompt.shape[1], np.int32)
    given = jax.device_put((params, prompt, lengths))
    tokens = jax.device_get(generate(config, *given, max_new_tokens=new, **sources))
    record(f"{name}: greedy", f"{(tokens == arrays['greedy']).all(0).sum()} of {new}")
    np.testing.assert_array_equal(tokens, arrays["greedy"])


@pytest.mark.parametrize(("form", "gelu"), [("tanh", "gelu_tanh"), ("erf", "gelu_erf")])
def test_logits_loss_and_gradient_of_gpt2_agree_with_transformers(
    form: str, gelu: Activation, record: Record
) -> None:
    read, params = hf.load(GOLDEN / "gpt2")
    assert isinstance(read, GPTConfig)
    config = dataclasses.replace(read, activation=gelu)
    arrays = golden("gpt2")

    @jax.jit
    def compute(params: Params, tokens: jax.Array) -> tuple[jax.Array, ...]:
        def loss(params: Params) -> jax.Array:
            return bind(config, params).losses(tokens[:, :-1], tokens[:, 1:]).tokens.mean()

        value, gradients = jax.value_and_grad(loss)(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        return bind(config, params)(tokens), value, sum(jax.tree.leaves(squares)) ** 0.5

    logits, loss, norm = jax.device_get(compute(*jax.device_put((params, arrays["tokens"]))))
    expected = {name: arrays[f"{form}/{name}"] for name in ("logits", "loss", "gradient_norm")}
    record("gpt2: logits", largest(logits, expected["logits"]))
    record("gpt2: loss", largest(loss, expected["loss"]))
    record("gpt2: gradient norm", f"{abs(norm / expected['gradient_norm'] - 1):.1e}")
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, expected["gradient_norm"], rtol=1e-5)


def test_the_golden_values_distinguish_both_forms_of_gelu() -> None:
    arrays = golden("gpt2")
    assert np.abs(arrays["tanh/logits"] - arrays["erf/logits"]).max() > 1e-4
