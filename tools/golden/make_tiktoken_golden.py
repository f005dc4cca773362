"""Write the GPT-2 token ids of tiktoken for text files and difficult strings.

Run in a separate environment (see README.md); the script downloads nothing:

    python make_tiktoken_golden.py DATA ../../packages/tjx-data/tests/golden/tiktoken_gpt2.json

DATA holds ``gpt2/encoder.json``, ``gpt2/vocab.bpe`` and text files in any folders. The output has,
for each file, the number of ids and their SHA-256 as little-endian uint32.
"""

import argparse
import array
import hashlib
import json
import pathlib
import sys

import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public as published

END = published.ENDOFTEXT
STRINGS = [
    "",
    " ",
    "Hello world",
    "I'm sure you'll say they've won't; we'd say it's 'SURE' I'M",
    "I\u2019m sure you\u2019ll see",
    "one  two   three    four\t\tfive \t six",
    "line\nline\r\nline\n\n\nline \n  indented\n\t\ttabs\n",
    "   leading and trailing   ",
    "\n\n \n",
    "def f(x):\n    if x == 1.5e-3:\n        return [x**2, {'a': None}]\n",
    "1234567890 3.14159 1,000,000 1st 2nd x2 2x \u00bd \u00b2 \u0664\u0662 \u4e00\u4e8c",
    "!!! ??? ... --- *** ### $5.00 100% a/b c:\\d <tag attr='v'/>",
    f"a{END}b {END}\n{END}{END}",
    "<|endoftext <|endoftext| |endoftext|>",
    "🙂😀 👍\U0001f3fd 👨\u200d👩\u200d👧 \U0001f1e9\U0001f1ea",
    "caf\u00e9 cafe\u0301 \u212b \u00c5 A\u030a \ufb01 \u1e9e stra\u00dfe",
    "日本語のテキスト。中文\uff0c한국어 Русский Ελληνικά",
    "שלום مرحبا हिन्दी ไทย abcאבגdef",
    "\u00a0no-break\u2003em\u2028line\u2029paragraph\u3000wide\u200bzero\u0085next\ufeffmark",
    "\x00\x01\x1f\x7f\u0080\ufffd\U0010ffff\ue000",
    "a" * 200,
    " " * 65,
    "Donaudampfschifffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft",
    "SolidGoldMagikarp rawdownloadcloneembedreportprint",
]


def load(folder: pathlib.Path) -> tiktoken.Encoding:
    """Load the GPT-2 encoding of tiktoken from the vocabulary in a folder."""
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"), str(folder / "encoder.json")
    )
    return tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50257,
        pat_str=published.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END: 50256},
    )


def summary(ids: list[int]) -> dict[str, int | str]:
    """Return the number of ids and their hash."""
    numbers = array.array("I", ids)
    assert numbers.itemsize == 4
    if sys.byteorder == "big":
        numbers.byteswap()
    return {"n_tokens": len(ids), "ids_sha256": hashlib.sha256(numbers.tobytes()).hexdigest()}


def main() -> None:
    """Parse the command line and write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    given = parser.parse_args()
    gpt2 = load(given.data / "gpt2")
    files = {}
    for file in sorted(given.data.rglob("*.txt")):
        content = file.read_bytes()
        files[file.relative_to(given.data).as_posix()] = {
            "file_sha256": hashlib.sha256(content).hexdigest(),
            **summary(gpt2.encode_ordinary(content.decode("utf-8"))),
        }
    strings = [{"text": text, "ids": gpt2.encode_ordinary(text)} for text in STRINGS]
    golden = {"made_with": {"tiktoken": tiktoken.__version__}, "files": files, "strings": strings}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {given.output}: {len(files)} files, {len(strings)} strings")


if __name__ == "__main__":
    main()
