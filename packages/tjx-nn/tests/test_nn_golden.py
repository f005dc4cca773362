"""Agreement with Hugging Face transformers on checkpoints loaded by `tjx_nn.hf`.

The folders are made by `tools/golden/make_hf_golden.py`.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import pytest

from tjx_nn import BertConfig, EncoderDecoderConfig, GPTConfig, bind, generate, hf
from tjx_nn.binding import Params
from tjx_nn.config import Activation
from tjx_nn.hf.families import BUILT_IN

Golden = dict[str, np.ndarray]

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Inputs of each model; the other arrays of golden.npz are expected outputs.
ARGUMENTS = {
    "bert": (("tokens",), ("token_types", "mask")),
    "vit": (("images",), ()),
    "roberta": (("tokens",), ("mask",)),
    "modernbert": (("tokens",), ("mask",)),
    "bart": (("source", "tokens"), ("source_mask",)),
    **dict.fromkeys(["t5", "t5_v1_1", "mt5"], (("source", "tokens"), ("source_mask",))),
}
HALF: Literal["bfloat16"] = "bfloat16"
DECODERS = [
    "llama", "llama3_rope", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2",
    "phi3", "mixtral", "qwen3_moe", "gpt_neox", "starcoder2",
    "deepseek_v2", "deepseek_v3", "smollm3", "granite", "cohere", "cohere2", "olmo3",
    "gpt_oss",
]  # fmt: skip


def golden(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz", allow_pickle=False) as file:
        return dict(file)


def test_every_family_has_golden_results() -> None:
    found: dict[tuple[str, ...], set[str]] = {}
    for path in GOLDEN.glob("*/config.json"):
        config = json.loads(path.read_text())
        key = config["model_type"], *config["architectures"]
        found.setdefault(key, set()).add(path.parent.name)
    families = {(family.model_type, family.architecture): family for family in BUILT_IN}
    assert families.keys() == found.keys()
    for key, family in families.items():
        tested = [*DECODERS, "gpt2"] if family.config is GPTConfig else ARGUMENTS
        assert found[key] & {*tested}


def partly_slow(*fast: str, of: Sequence[str] = DECODERS) -> list[Any]:
    """Parameters of a test of all decoders that runs nightly except for a few."""
    return [pytest.param(x, marks=[] if x in fast else pytest.mark.slow) for x in of]


def loss_and_logits(config: Any, params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    model = bind(config, params)
    x, _ = model.run_blocks(model.embed_tokens(tokens), tokens, drop_tokens=False)
    return model.token_losses(x[:, :-1], tokens[:, 1:]).mean(), model.logits(model.ln_f(x))


@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_loss_of_decoders_agree_with_transformers(name: str) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    compute = jax.jit(functools.partial(loss_and_logits, config))
    loss, logits = jax.device_get(compute(*jax.device_put((params, arrays["tokens"]))))
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", partly_slow("gemma3", "olmo2", "gpt_neox", "deepseek_v3", "gpt_oss")
)
def test_gradients_of_decoders_agree_with_transformers(name: str) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)

    @jax.jit
    def compute(params: Params, tokens: jax.Array) -> Any:
        gradients = jax.grad(lambda p: loss_and_logits(config, p, tokens)[0])(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        return sum(jax.tree.leaves(squares)) ** 0.5

    norm = jax.device_get(compute(*jax.device_put((params, arrays["tokens"]))))
    np.testing.assert_allclose(norm, arrays["gradient_norm"], rtol=1e-5)


# Largest root mean square error of bfloat16 logits, as a multiple of that of transformers.
MOST_BFLOAT16_ERROR = 1.5


@pytest.mark.parametrize(("kind", "length"), [("short", 8), ("long", 36)])
def test_longrope_agrees_with_transformers_up_to_and_beyond_the_original_length(
    kind: str, length: int
) -> None:
    read, params = hf.load(GOLDEN / "phi3_longrope")
    assert isinstance(read, GPTConfig)
    assert (read.max_seq_len, read.longest_seq_len) == (8, 36)
    config = dataclasses.replace(read, max_seq_len=length)
    arrays = golden("phi3_longrope")
    tokens, expected = arrays["tokens"], arrays["logits"]
    if kind == "short":
        tokens, expected = tokens[:, :8], arrays["short/logits"]
        with pytest.raises(ValueError, match="16 tokens; expected at most max_seq_len 8"):
            loss_and_logits(config, params, jax.device_put(arrays["tokens"]))
    compute = jax.jit(functools.partial(loss_and_logits, config))
    _, found = jax.device_get(compute(*jax.device_put((params, tokens))))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    greedy = arrays[f"{kind}/greedy"]
    start = {"short": 4, "long": 9}[kind]
    given = jax.device_put((params, tokens[:, :start], np.array([start, start], np.int32)))
    new = generate(config, *given, max_new_tokens=greedy.shape[1], temperature=0.0)
    np.testing.assert_array_equal(new, greedy)


def check_bfloat16(found: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> None:
    """Compare the error of bfloat16 logits with that of transformers' (stored as uint16)."""
    errors = found - exact, theirs.view(HALF).astype(np.float32) - exact
    ours, allowed = (np.square(error).mean() ** 0.5 for error in errors)
    assert ours <= MOST_BFLOAT16_ERROR * allowed
    assert ours > 1e-3  # it computes in bfloat16


@pytest.mark.parametrize(
    "name", partly_slow("gemma3", "mixtral", "gpt_oss", of=["gpt2", *DECODERS])
)
def test_bfloat16_logits_of_decoders_are_as_exact_as_those_of_transformers(name: str) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    compute = jax.jit(functools.partial(loss_and_logits, dataclasses.replace(config, dtype=HALF)))
    _, found = jax.device_get(compute(*jax.device_put((params, arrays["tokens"]))))
    exact = arrays["tanh/logits" if name == "gpt2" else "logits"]
    check_bfloat16(found, arrays["bfloat16_logits"], exact)


@pytest.mark.parametrize("name", partly_slow("gemma3", "mixtral", "gpt_oss"))
def test_greedy_tokens_of_decoders_agree_with_transformers(name: str) -> None:
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    assert isinstance(config, GPTConfig)
    given = jax.device_put((params, arrays["tokens"][:, :4], np.array([4, 4], np.int32)))
    tokens = generate(config, *given, max_new_tokens=32, temperature=0.0)
    np.testing.assert_array_equal(tokens, arrays["greedy"])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_logits_agree_with_transformers(name: str) -> None:
    config: Any  # the type of the model depends on the configuration
    config, params = hf.load(GOLDEN / name)
    arrays = golden(name)
    names, keywords = ARGUMENTS[name]
    arguments = tuple(arrays[name] for name in names), {name: arrays[name] for name in keywords}

    @jax.jit
    def logits(params: Params, positional: Any, keyword: Any) -> jax.Array:
        found: jax.Array = bind(config, params)(*positional, **keyword)
        return found

    found = jax.device_get(logits(*jax.device_put((params, *arguments))))
    # Outputs at padding are undefined.
    seen = arrays["mask"] > 0 if "mask" in arrays else ...
    np.testing.assert_allclose(found[seen], arrays["logits"][seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", partly_slow("t5", "t5_v1_1", of=["t5", "t5_v1_1", "mt5"]))
def test_loss_gradient_and_greedy_tokens_of_t5_agree_with_transformers(name: str) -> None:
    config, params = hf.load(GOLDEN / name)
    assert isinstance(config, EncoderDecoderConfig)
    arrays = golden(name)

    @jax.jit
    def compute(params: Params, arrays: Golden) -> Any:
        given, mask = (arrays["source"], arrays["tokens"]), arrays["source_mask"]

        def loss(params: Params) -> jax.Array:
            losses = bind(config, params).losses(*given, arrays["labels"], source_mask=mask).tokens
            return losses.sum() / (arrays["labels"] >= 0).sum()

        value, gradients = jax.value_and_grad(loss)(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        half = bind(dataclasses.replace(config, dtype=HALF), params)(*given, source_mask=mask)
        return value, sum(jax.tree.leaves(squares)) ** 0.5, half

    inputs = {key: arrays[key] for key in ("source", "source_mask", "tokens", "labels")}
    loss, norm, half = jax.device_get(compute(*jax.device_put((params, inputs))))
    np.testing.assert_allclose(loss, arrays["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, arrays["gradient_norm"], rtol=1e-5)
    check_bfloat16(half, arrays["bfloat16_logits"], arrays["logits"])

    prompt = np.full((2, 1), config.start_id, np.int32), np.ones(2, np.int32)
    given = jax.device_put((params, *prompt))
    source, mask = arrays["source"], arrays["source_mask"]
    tokens = generate(
        config, *given, max_new_tokens=32, temperature=0.0, source=source, source_mask=mask
    )
    np.testing.assert_array_equal(tokens, arrays["greedy"])


def test_masked_lm_loss_and_gradient_of_modernbert_agree_with_transformers() -> None:
    config, params = hf.load(GOLDEN / "modernbert")
    assert isinstance(config, BertConfig)
    arrays = golden("modernbert")

    @jax.jit
    def compute(params: Params, tokens: jax.Array, labels: jax.Array, mask: jax.Array) -> Any:
        def loss(params: Params) -> jax.Array:
            losses = bind(config, params).losses(tokens, labels, mask=mask).tokens
            return losses.sum() / (labels >= 0).sum()

        value, gradients = jax.value_and_grad(loss)(params)
        squares = jax.tree.map(lambda g: (g * g).sum(), gradients)
        return value, sum(jax.tree.leaves(squares)) ** 0.5

    given = params, *(arrays[name] for name in ("tokens", "labels", "mask"))
    loss, norm = jax.device_get(compute(*jax.device_put(given)))
    np.testing.assert_allclose(loss, arrays["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, arrays["gradient_norm"], rtol=1e-5)


@pytest.mark.parametrize(("form", "gelu"), [("tanh", "gelu_tanh"), ("erf", "gelu_erf")])
def test_logits_loss_and_gradient_of_gpt2_agree_with_transformers(
    form: str, gelu: Activation
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
    np.testing.assert_allclose(logits, arrays[f"{form}/logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(loss, arrays[f"{form}/loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, arrays[f"{form}/gradient_norm"], rtol=1e-5)


def test_the_golden_values_distinguish_both_forms_of_gelu() -> None:
    arrays = golden("gpt2")
    assert np.abs(arrays["tanh/logits"] - arrays["erf/logits"]).max() > 1e-4
