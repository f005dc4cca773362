"""What is wrong and the user can mend."""


class EvalError(ValueError):
    """What cannot be answered; the message says in one sentence why and what to do."""
