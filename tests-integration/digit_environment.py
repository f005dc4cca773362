"""Environment of the tests of several processes: two turns, and rewards without training.

The trainer imports it by the environment variable TJX_EXTENSIONS.
"""

import tjx_rl


class Digits:
    """Answers the first response with a number; rewards digits.

    Parameters
    ----------
    prompt, answer : str
        Not used.
    """

    def __init__(self, prompt: str, answer: str) -> None:
        del prompt, answer
        self._turns = 0

    def step(self, response: str) -> tjx_rl.EnvironmentStep:
        """Return a number the first time; the reward is 0.1 for each digit.

        Parameters
        ----------
        response : str
            Text of the response.
        """
        self._turns += 1
        reward = sum(map(str.isdigit, response)) / 10
        return tjx_rl.EnvironmentStep(f"={self._turns}+" if self._turns == 1 else None, reward)


tjx_rl.register_environment("digits", Digits)
