"""An environment: hints whether a guess is too small; fewer guesses have a higher reward."""

import tjx_rl


class GuessTheNumber:
    """Episode of guesses; its steps are a function of the responses."""

    def __init__(self, prompt: str, answer: str) -> None:
        del prompt  # it asks for a number
        self.answer, self.guesses = int(answer), 0

    def step(self, response: str) -> tjx_rl.EnvironmentStep:
        """Return a hint, or the reward of the right guess and the end of the episode."""
        self.guesses += 1
        if not response.strip().isdecimal():
            return tjx_rl.EnvironmentStep(None, 0.0)
        guess = int(response)
        if guess == self.answer:
            return tjx_rl.EnvironmentStep(None, 1 / self.guesses)
        return tjx_rl.EnvironmentStep(" too small: " if guess < self.answer else " too large: ")


tjx_rl.register_environment(__name__, GuessTheNumber)
