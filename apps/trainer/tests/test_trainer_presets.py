"""Every preset resolves and documents model, data, duration and results."""

import pytest

from tjx_trainer.cli.arguments import resolve
from tjx_trainer.config.presets import HEAD, load_preset, preset_names

MEASURED = {"quickstart", "speedrun_cpu", "shakespeare_char", "vit_mnist", "seq2seq_toy"}
WANTED = {
    *MEASURED,
    *("tinystories_speedrun", "wikitext103_gpt2_small", "wikipedia_gpt2_small"),
    *("llama_small", "deepseek_small"),
    *(
        "gpt2_small",
        "gpt2_small_speedrun",
        "gpt2_medium",
        "gpt2_large",
        "gpt2_xl",
        "bert_base",
        "nanogpt",
    ),
}


def test_the_presets_are_complete() -> None:
    assert set(preset_names()) == WANTED


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_resolves_and_its_head_has_four_parts(name: str) -> None:
    assert resolve(["--config", name]).name == name
    head = load_preset(name).head
    assert tuple(head) == HEAD
    assert all(said.endswith(".") for said in head.values())
    # Estimates are marked as such.
    for part in ("Time", "Reaches"):
        assert ("not measured" in head[part]) == (name not in MEASURED)
        assert "measured" in head[part]


def test_the_head_of_a_users_preset_is_free_text() -> None:
    text = "# Mine: it learns\n#   slowly.\n# What: all of it.\nmodel:\n"
    from tjx_trainer.config.presets import read_head

    assert read_head(text) == {"Mine": "it learns slowly.", "What": "all of it."}
    assert read_head("# no name here\n") == {}
