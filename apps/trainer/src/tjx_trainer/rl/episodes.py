"""Episodes: the responses to a prompt, and the observations of an environment between them."""

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import tjx_rl
from tjx_trainer.rl.prompt_format import PromptFormat
from tjx_trainer.rl.rollouts import Rollouts
from tjx_trainer.rl.row_exchange import compute_rows

# (contexts, turn) -> a response to each.
SampleTurn = Callable[[Sequence[Sequence[int]], int], Rollouts]


@dataclass
class Episode:
    """Responses and observations after a prompt, possibly incomplete.

    Attributes
    ----------
    tokens : list of int
        Responses and the observations between them.
    is_sampled : list of bool
        Which tokens are responses; the others are not trained on.
    log_probs : list of float
        Log-probability of each token under the sampler [nats]; 0 for observations.
    turns : int
        Number of responses.
    ended : bool
        Whether the last response has the token that ends it.
    score : float
        Reward.
    failure : str or None
        Why verifier or environment failed; None if they did not.
    """

    tokens: list[int] = field(default_factory=list)
    is_sampled: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    turns: int = 0
    ended: bool = False
    score: float = 0.0
    failure: str | None = None

    def add_response(self, tokens: list[int], log_probs: list[float], *, ended: bool) -> None:
        """Append a sampled response."""
        self._add(tokens, log_probs, is_sampled=True)
        self.turns, self.ended = self.turns + 1, ended

    def add_observation(self, tokens: list[int]) -> None:
        """Append tokens that the model reads."""
        self._add(tokens, [0.0] * len(tokens), is_sampled=False)

    def _add(self, tokens: list[int], log_probs: list[float], *, is_sampled: bool) -> None:
        self.tokens += tokens
        self.is_sampled += [is_sampled] * len(tokens)
        self.log_probs += log_probs


def run_episodes(
    form: PromptFormat,
    prompts: Sequence[Sequence[int]],
    environments: Mapping[int, tjx_rl.Environment] | None,
    sample: SampleTurn,
    *,
    max_turns: int,
    max_context: int,
) -> list[Episode]:
    """Sample responses until each environment ends its episode.

    Every turn samples rows of the same number and length, so that one program is compiled.

    Parameters
    ----------
    form : PromptFormat
        Encoding of responses and observations.
    prompts : sequence of token sequences
        The prompts.
    environments : mapping of int to Environment, or None
        The environments of `own_rows`, which run in this process; all processes get their rewards
        and observations. None: an episode has one response, which is not scored here.
    sample : callable
        From contexts and the number of the turn to responses.
    max_turns : int
        Largest number of responses of an episode.
    max_context : int
        Largest number of tokens before a response; an episode whose next context is longer ends
        with the rewards so far.
    """
    episodes = [Episode() for _ in prompts]
    active = list(range(len(prompts)))
    for turn in range(max_turns):
        contexts = [*prompts]
        for i in active:
            contexts[i] = [*prompts[i], *episodes[i].tokens]
        sampled = sample(contexts, turn)
        for i in active:
            tokens = sampled.tokens[i]
            ended = form.stop_token in tokens
            episodes[i].add_response(tokens, sampled.log_probs[i].tolist(), ended=ended)
        if environments is None:
            break
        steps = compute_rows(
            len(prompts),
            functools.partial(_take_steps, form, environments, sampled.tokens, {*active}),
        )
        last = turn + 1 == max_turns
        active = [
            i
            for i in active
            if _continues(
                form, episodes[i], *steps[i], room=0 if last else max_context - len(prompts[i])
            )
        ]
        if not active:
            break
    return episodes


def _take_steps(
    form: PromptFormat,
    environments: Mapping[int, tjx_rl.Environment],
    responses: Sequence[list[int]],
    active: Set[int],
    rows: range,
) -> list[tuple[float, str | None, str | None] | None]:
    """Return reward, observation and failure of the active rows; None for the others."""

    def take(row: int) -> tuple[float, str | None, str | None]:
        response = form.decode_response(responses[row])
        step, failure = tjx_rl.take_step(environments[row], response)
        return float(step.reward), step.observation, failure

    return [take(row) if row in active else None for row in rows]


def _continues(
    form: PromptFormat,
    episode: Episode,
    reward: float,
    observation: str | None,
    failure: str | None,
    *,
    room: int,
) -> bool:
    """Add the answer of an environment to an episode; return whether it goes on."""
    episode.score, episode.failure = episode.score + reward, failure
    if observation is None:
        return False
    try:
        tokens = form.encode_observation(observation)
    except ValueError as error:  # such as characters that the tokenizer does not have
        episode.failure = f"observation: {error}"[:200]
        return False
    if len(episode.tokens) + len(tokens) > room:
        return False
    episode.add_observation(tokens)
    return True
