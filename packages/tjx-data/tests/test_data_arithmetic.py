"""Corpus arithmetic: right answers, and splits without a common prompt."""

from itertools import pairwise

from tjx_data import load_corpus
from tjx_data.corpora.arithmetic import addition_problems


def test_answers_are_right_and_held_out_prompts_never_occur_in_the_text() -> None:
    train, held_out = addition_problems("train"), addition_problems("validation")
    assert len({each.prompt for each in train + held_out}) == 8100
    for prompt, answer in train + held_out:
        first, second = prompt.removesuffix("=").split("+")
        assert int(first) + int(second) == int(answer)
    assert 0.05 < len(held_out) / 8100 < 0.15
    assert list(load_corpus("arithmetic")) == ["".join(each) for each in train]
    # Neighbors have nothing in common, so that a row does not give answers away.
    assert sum(a.prompt[:3] == b.prompt[:3] for a, b in pairwise(train)) < 200
