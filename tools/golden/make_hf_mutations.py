"""Write configs.json: default configurations of transformers, and logits of mutated config.json.

The golden folders of make_hf_golden.py must exist. Each mutation changes, drops or adds entries of
a folder's config.json; its result is a few logits of the model that transformers loads from it, or
null if transformers fails to load it or finds missing, unexpected or mismatched tensors.
With names of models only theirs are written, and the others kept.

Run it in a separate environment (see README.md):

    python make_hf_mutations.py ../../packages/tjx-nn/tests/golden
"""

import argparse
import json
import pathlib
import random
import shutil
import tempfile
from typing import Any

import numpy as np
import torch
import transformers

PER_MODEL = 15
# Names of the arguments of encoder-decoders in transformers.
SEQ2SEQ = {"source": "input_ids", "source_mask": "attention_mask", "tokens": "decoder_input_ids"}
# Values of strings, besides those of the model itself.
STRINGS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "relu", "full_attention"]
ROPE_ENTRIES: dict[str, Any] = {
    "factor": 2.0, "rope_theta": 77.0, "partial_rotary_factor": 0.5, "attention_factor": 0.7,
    "original_max_position_embeddings": 6, "beta_fast": 4.0, "truncate": False, "type": "linear",
}  # fmt: skip
INVENTED = {"attention_multiplier": 0.3, "residual_scale": 2.0, "logit_scale": 0.1}
# Keys of earlier versions.
LEGACY = {
    "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "rotary_pct": 1.0,
    "rotary_emb_base": 77, "rope_local_base_freq": 77.0, "sliding_window_pattern": 3,
    "num_experts": 3, "hidden_activation": "relu", "partial_rotary_factor": 0.75, "head_dim": 8,
}  # fmt: skip
IDENTITY = {"architectures", "model_type", "transformers_version", "dtype"}


def other_value(value: Any, random_: random.Random) -> Any:
    """Return another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return random_.choice([value + 1, value * 2, max(1, value // 2), 3])
        case float():
            return random_.choice([value * 2 + 0.5, value / 2, 0.25])
        case str():
            return random_.choice([each for each in STRINGS if each != value])
        case None:
            return random_.choice([4, 0.5, True])
        case list():
            return random_.choice([value[::-1], value[:-1], []])
        case dict():
            key = random_.choice(sorted({**ROPE_ENTRIES, **value}))
            changed = other_value(value[key], random_) if key in value else ROPE_ENTRIES[key]
            return {**value, key: changed}
    raise AssertionError(value)


def mutate(
    config: dict[str, Any], pool: dict[str, Any], random_: random.Random
) -> tuple[dict[str, Any], list[str]]:
    """Return entries to set and keys to drop."""
    keys = sorted(config.keys() - IDENTITY)
    match random_.choice(["change", "change", "drop", "add", "add"]):
        case "change":
            key = random_.choice(keys)
            return {key: other_value(config[key], random_)}, []
        case "drop":
            return {}, random_.sample(keys, random_.choice([1, 1, 2]))
        case _:
            key = random_.choice(sorted(pool.keys() - config.keys()))
            return {key: pool[key]}, []


def logits(folder: pathlib.Path, inputs: dict[str, torch.Tensor]) -> list[float] | None:
    """Return logits of the last position of the model in a folder, or None if it does not load."""
    kind = transformers.AutoModelForCausalLM
    if "decoder_input_ids" in inputs:
        kind = transformers.AutoModelForSeq2SeqLM
    try:
        model, info = kind.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        if any(info.values()):
            return None
        with torch.no_grad():
            found = model.eval()(**inputs).logits[:, -1, ::16].flatten()
    except Exception as error:
        print(f"  {type(error).__name__}: {str(error)[:80]}")
        return None
    values = [round(x, 4) for x in found.tolist()]
    return values if all(np.isfinite(values)) else None


def main() -> None:
    """Write configs.json to the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("golden", type=pathlib.Path)
    parser.add_argument("names", nargs="*", help="models to write; default all")
    arguments = parser.parse_args()
    golden = arguments.golden
    transformers.logging.set_verbosity_error()
    configs = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(golden.glob("*/config.json"))
    }
    defaults = {}
    for config in configs.values():
        made = transformers.AutoConfig.for_model(config["model_type"])
        made.architectures = config["architectures"]
        defaults[config["model_type"]] = made.to_dict()
    kept: dict[str, Any] = {"defaults": {}, "mutations": []}
    if arguments.names:
        kept = json.loads((golden / "configs.json").read_text())
        named = {configs[name]["model_type"] for name in arguments.names}
        defaults = kept["defaults"] | {kind: defaults[kind] for kind in sorted(named)}
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    for name in configs:
        with np.load(golden / name / "golden.npz", allow_pickle=False) as file:
            if {"greedy", "logits"} <= {*file}:  # not GPT-2
                names = SEQ2SEQ if "source" in file else {"tokens": "input_ids"}
                inputs[name] = {
                    key: torch.from_numpy(file[own]).long() for own, key in names.items()
                }
    # Decoders and encoder-decoders have mutations by the keys of their own kind.
    pools = [INVENTED | LEGACY, INVENTED | LEGACY]
    for name, given in inputs.items():
        pool = pools["decoder_input_ids" in given]
        pool |= {key: value for key, value in configs[name].items() if key not in pool}
    mutations = [each for each in kept["mutations"] if each["model"] not in arguments.names]
    for name in arguments.names or inputs:
        pool = pools["decoder_input_ids" in inputs[name]]
        random_ = random.Random(name)  # noqa: S311  no secret
        for _ in range(PER_MODEL):
            entries, dropped = mutate(configs[name], pool, random_)
            with tempfile.TemporaryDirectory() as temporary:
                folder = pathlib.Path(temporary) / name
                shutil.copytree(golden / name, folder)
                changed = {k: v for k, v in configs[name].items() if k not in dropped} | entries
                (folder / "config.json").write_text(json.dumps(changed))
                found = logits(folder, inputs[name])
            mutation = {"model": name, "set": entries, "drop": dropped, "logits": found}
            print(json.dumps(mutation)[:160])
            mutations.append(mutation)
    lines = ",\n".join(json.dumps(mutation) for mutation in mutations)
    rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in defaults.items())
    text = f'{{"defaults": {{\n{rows}\n}},\n"mutations": [\n{lines}\n]}}\n'
    (golden / "configs.json").write_text(text)
    print(len(mutations), "mutations,", sum(x["logits"] is not None for x in mutations), "load")


if __name__ == "__main__":
    main()
