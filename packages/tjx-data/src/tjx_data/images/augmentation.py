"""What is done to images that are trained on; only the standard library is needed to read it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to images that are trained on; the default is nothing.

    Attributes
    ----------
    crop : int
        Images are moved by up to so many pixels in both directions: padded by them on all sides
        with the mean colour, and cut out again at a random place. 4 is usual for 32 x 32 pixels.
    flip : bool
        Whether every second image, on average, has left and right exchanged.
    erase : float
        Probability that a rectangle (2 to 40 % of the area) takes the mean colour. Zhong et al.
        2017, "Random Erasing Data Augmentation"; 0.25 is usual.

    Raises
    ------
    ValueError
        With a line for each number that is out of range.
    """

    crop: int = 0
    flip: bool = False
    erase: float = 0.0

    def __post_init__(self) -> None:
        problems = []
        if self.crop < 0:
            problems.append(f"crop={self.crop}: give a number of pixels, 0 or more")
        if not 0 <= self.erase <= 1:
            problems.append(f"erase={self.erase}: give a probability from 0 to 1")
        if problems:
            raise ValueError("\n".join(problems))


NO_AUGMENTATION = Augmentation()
