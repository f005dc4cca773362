"""Augmentation settings of images; imports the standard library only."""

from dataclasses import dataclass

from tjx_core import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of training images; the default changes nothing.

    Attributes
    ----------
    crop : int
        Pixels of padding with the mean color on all sides, from which a random crop of the original
        size is taken. 4 is usual for 32 x 32 pixels.
    flip : bool
        Flip each image horizontally with probability 1/2.
    erase : float
        Probability that a rectangle of 2 to 40 % of the area is set to the mean color (Zhong et al.
        2017, "Random Erasing Data Augmentation"); 0.25 is usual.

    Raises
    ------
    ValueError
        With one line for each invalid number.
    """

    crop: int = 0
    flip: bool = False
    erase: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.crop < 0:
            problems.append(Problem("crop", f"got {self.crop}; expected 0 or more pixels"))
        if not 0 <= self.erase <= 1:
            problems.append(Problem("erase", f"got {self.erase}; expected a probability in [0, 1]"))
        if problems:
            raise ConfigError(problems)


NO_AUGMENTATION = Augmentation()
