"""Configuration of distillation from a teacher. Standard library and tjx_core only."""

import math
from dataclasses import dataclass, fields

from tjx_core import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation: the loss is (1 - weight) * cross-entropy + weight * temperature^2 * KL.

    KL is the divergence of the student's distribution of each next token from the teacher's (Hinton
    et al. 2015, "Distilling the Knowledge in a Neural Network"), at the positions of the labels.

    In task grpo the responses of the student are compared with the teacher: the advantage of a
    token is (1 - weight) * advantage of its reward + weight * (log-probability under the teacher -
    log-probability under the student), the policy gradient of the reverse KL of each token (Gu et
    al. 2023, "MiniLLM"; Agarwal et al. 2023, "On-Policy Distillation of Language Models").

    Attributes
    ----------
    teacher
        Run directory, or folder in the format of Hugging Face transformers, of a frozen decoder
        with the tokenizer of the data; none: no distillation.
    teacher_sha256
        SHA-256 of the teacher's configuration and parameters, which a run records and compares when
        it is resumed; none: any.
    temperature
        Divisor of the logits of both models in the divergence.
    weight
        Weight of the divergence, above 0 and at most 1.

    Raises
    ------
    ConfigError
        With every invalid value.
    """

    teacher: str | None = None
    teacher_sha256: str | None = None
    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            message = f"got {self.temperature}; expected a finite number above 0, such as 2"
            problems.append(Problem("temperature", message))
        if not 0 < self.weight <= 1:
            message = f"got {self.weight}; expected above 0 and at most 1, such as 0.5"
            problems.append(Problem("weight", message))
        if self.teacher is None:
            message = "got one without teacher; expected both; give --distill.teacher FOLDER"
            problems += [
                Problem(field.name, message, ("teacher",))
                for field in fields(self)
                if getattr(self, field.name) != field.default
            ]
        if problems:
            raise ConfigError(problems)
