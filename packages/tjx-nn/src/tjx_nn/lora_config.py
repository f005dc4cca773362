"""Configuration of low-rank adapters. Importing it needs only the standard library."""

import math
from dataclasses import dataclass
from typing import Literal

from tjx_nn.problems import Problem, raise_problems
from tjx_nn.sub_configs import check_choices, check_sizes

BaseDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters of linear layers: LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024).

    A layer computes ``x @ kernel + (alpha / rank) * x @ a @ b``; only a and b are trained.

    Attributes
    ----------
    rank
        Columns of a and rows of b; none: no adapters, all parameters are trained.
    alpha
        Scale of the adapters; they are multiplied by alpha / rank.
    targets
        Linear layers with adapters: patterns of dotted paths, separated by commas, such as
        "blocks.attention.*" or "query,value". A pattern matches a path or its end.
    dora
        Whether to train the norm of each output's weights separately (DoRA).
    base_dtype
        Dtype of the parameters that are not trained: float32, bfloat16, or int8 or int4 (the
        kernels of linear layers in blocks, see `quantize`; the rest float32).

    Raises
    ------
    ValueError
        With a line for each invalid value.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: str = "*"
    dora: bool = False
    base_dtype: BaseDtype = "float32"

    def __post_init__(self) -> None:
        problems = check_sizes(self, "rank") + check_choices(self, base_dtype=BaseDtype)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            problems.append(Problem("alpha", f"got {self.alpha}; expected a finite number above 0"))
        if not self.patterns:
            problems.append(
                Problem(
                    "targets",
                    f"got {self.targets!r}; expected patterns such as 'query,value'; '*' is "
                    "every linear layer",
                )
            )
        raise_problems(problems)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns in `targets`."""
        return tuple(part.strip() for part in self.targets.split(",") if part.strip())

    @property
    def scale(self) -> float:
        """Factor of the adapters: alpha / rank."""
        assert self.rank is not None
        return self.alpha / self.rank
