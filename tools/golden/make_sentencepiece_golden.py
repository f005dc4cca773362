"""Write small SentencePiece models with the ids and texts that SentencePiece gives.

Run in a separate environment (see README.md); the script downloads nothing:

    python make_sentencepiece_golden.py ../../packages/tjx-data/tests/golden/sentencepiece.json
"""

import argparse
import base64
import contextlib
import io
import json
import pathlib
import random
import tempfile

import sentencepiece

WORDS = """
    the of and to in that it was he his with as for had you not be her is at on by which have from
    this him but all she they were are my one so there been their would said when will what Straße
    café naïve Ελλάδα Москва 日本語 中文 שלום हिन्दी walking walked talk talking 12 1984 3.14
""".split()  # noqa: SIM905  a text is easier to read
STRAY = [
    " leading", "trailing ", "a  b", "two\n\nlines", "a\tb", "<s> </s> <unk> <pad>",
    "<start_of_turn>user\nhello<end_of_turn>\n", "a<end_of_turn> b", "the▁", "<0x41>A",
    "ABC the ﬁrst Ⅷ x² ½", "    four", "the the the the",
]  # fmt: skip
KINDS = {
    # As T5: Unigram, extra spaces removed, some characters mapped to others.
    "unigram": {
        "model_type": "unigram", "normalization_rule_tsv": "rules", "character_coverage": 0.98,
        "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1,
    },
    # As Llama 2: BPE with bytes, nothing removed, a space before each text.
    "bpe_bytes": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 0.98, "split_digits": True,
        "allow_whitespace_only_pieces": True, "vocab_size": 500,
    },
    # As Gemma: no space before texts, user-defined pieces.
    "bpe_user_defined": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "character_coverage": 0.98,
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "▁▁", "▁▁▁▁", "\n\n"],
        "vocab_size": 500,
    },
    "unigram_bytes": {
        "model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 0.98, "vocab_size": 450,
    },
}  # fmt: skip


def train(options: dict[str, object]) -> bytes:
    """Train a model on random sentences of `WORDS`; return its file."""
    draw = random.Random(0)  # noqa: S311  sentences, not secrets
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(3000)]
    if "normalization_rule_tsv" in options:
        rules = pathlib.Path("rules.tsv")  # the model holds this name
        mapped = {"ﬁ": "fi", "Ⅷ": "VIII", "²": "2", "\t": " ", "\n": " ", "½": "1/2"}

        def code_points(text: str) -> str:
            return " ".join(f"{ord(character):X}" for character in text)

        rules.write_text(
            "".join(f"{code_points(k)}\t{code_points(v)}\n" for k, v in mapped.items())
        )
        options = {**options, "normalization_rule_tsv": str(rules)}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, num_threads=1, minloglevel=2,
        **{"vocab_size": 200, "hard_vocab_limit": False, **options},
    )  # fmt: skip
    return model.getvalue()


def main() -> None:
    """Parse the command line and write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=pathlib.Path)
    output = parser.parse_args().output.resolve()
    strings = json.loads(output.with_name("tiktoken_gpt2.json").read_text())["strings"]
    texts = [*(each["text"] for each in strings), *STRAY]
    found = {"sentencepiece": sentencepiece.__version__, "texts": texts, "models": {}}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, options in KINDS.items():
            model = train(options)
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            ids = [processor.encode(text) for text in found["texts"]]
            found["models"][name] = {
                "model": base64.b64encode(model).decode(),
                "ids": ids,
                "decoded": [processor.decode(each) for each in ids],
                "control": [i for i in range(len(processor)) if processor.is_control(i)],
            }
    output.write_text(json.dumps(found, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
