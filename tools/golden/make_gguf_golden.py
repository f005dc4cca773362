"""Write what llama.cpp computes with exported models: apps/eval/tests/golden/gguf.npz.

For each file: its SHA-256, the ids of the texts, 24 greedy tokens after a prompt, the log
probabilities of the first and the last of them, and the ids of a conversation.

It reads the files that `apps/eval/tests/gguf_models.py` writes. Run it in a separate environment
(see README.md), with `pip install xllamacpp==2026.10.11549`:

    python make_gguf_golden.py /tmp/gguf ../../apps/eval/tests/golden
"""

import argparse
import hashlib
import http.client
import json
import pathlib
from typing import Any

import numpy as np
import xllamacpp

N_CTX, PROMPT, NEW = 128, 16, 24


def serve(file: pathlib.Path) -> xllamacpp.Server:
    """Start a server of a model, with a float32 KV cache."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = N_CTX, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 1
    return xllamacpp.Server(params)


def golden(file: pathlib.Path, texts: list[str], messages: list[dict[str, str]]) -> dict[str, Any]:
    """Return the results of a model."""
    server = serve(file)

    def post(path: str, **content: Any) -> Any:
        connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps(content), headers)
        return json.load(connection.getresponse())

    def tokenize(text: str, **options: Any) -> list[int]:
        ids: list[int] = post("/tokenize", content=text, add_special=True, **options)["tokens"]
        return ids

    ids = [tokenize(text, parse_special=False) for text in texts]
    chat = post("/apply-template", messages=messages)["prompt"]
    tokens = ids[0][:PROMPT]
    positions, rows, margins = [], [], []
    for position in range(PROMPT - 1, PROMPT - 1 + NEW):
        answer = post(
            "/completion", prompt=tokens, n_predict=1, temperature=0, n_probs=1 << 20,
            return_tokens=True, cache_prompt=False,
        )  # fmt: skip
        tokens = [*tokens, *answer["tokens"]]
        assert len(tokens) == position + 2, answer
        # The server has no probabilities where a token ends inside a character.
        for step in answer.get("completion_probabilities", []):
            best, second, *_ = sorted(entry["logprob"] for entry in step["top_logprobs"])[::-1]
            margins.append(best - second)
            positions.append(position)
            rows.append(np.zeros(len(step["top_logprobs"]), np.float32))
            for entry in step["top_logprobs"]:
                rows[-1][entry["id"]] = entry["logprob"]
    print(f"{file.name}: {len(set(tokens[PROMPT:]))} tokens, smallest margin {min(margins):.4f}")
    return {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tokens": np.array(tokens, np.int32),
        "positions": np.array([positions[0], positions[-1]], np.int32),
        "logprobs": np.array([rows[0], rows[-1]]),
        "chat": np.array(tokenize(chat, parse_special=True), np.int32),
        **{f"text_{i}": np.array(found, np.int32) for i, found in enumerate(ids)},
    }


def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    inputs = json.loads((arguments.exported / "inputs.json").read_text())
    arrays = {
        f"{file.stem}/{name}": value
        for file in sorted(arguments.exported.glob("*.gguf"))
        for name, value in golden(file, **inputs).items()
    }
    arguments.folder.mkdir(exist_ok=True)
    np.savez_compressed(arguments.folder / "gguf.npz", **arrays)


if __name__ == "__main__":
    main()
