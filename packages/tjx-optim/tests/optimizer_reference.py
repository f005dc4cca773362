"""Reference optimizers from the papers, in NumPy float64, one layer at a time.

They share no code with the package: each layer is a separate array with its own state, and the
caller passes which parameters decay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any  # of float64; NumPy's operators return Any too
Settings = Mapping[str, Any]
Arrays = dict[str, Array]


def keep(moment: Array) -> Array:
    """Store a moment without rounding."""
    return moment


def keep_eight_bits(moment: Array) -> Array:
    """Round to the eight significant bits of a bfloat16, half to even."""
    mantissa, exponent = np.frexp(moment)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


@dataclass
class Layer:
    """One layer of one parameter, with its optimizer state."""

    path: str
    index: tuple[int, ...]
    weights: Array
    decay: float = 0.0
    rate_scale: float = 1.0
    is_matrix: bool = False
    store: Callable[[Array], Array] = keep
    state: dict[str, Any] = field(default_factory=dict)

    def moment(self, name: str, keep_rate: float, new: Array, add_rate: float) -> Array:
        """Compute ``keep_rate * moment + add_rate * new``; store it rounded, return it exact."""
        moment = keep_rate * self.state.get(name, 0.0) + add_rate * new
        self.state[name] = self.store(moment)
        return moment


def adam_direction(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    m = layer.moment("m", s["b1"], g, 1 - s["b1"])
    v = layer.moment("v", s["b2"], g**2, 1 - s["b2"])
    return m / (1 - s["b1"] ** t) / (np.sqrt(v / (1 - s["b2"] ** t)) + s["eps"])


def sgd(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    m = layer.moment("m", s["momentum"], g, 1.0)
    step = g + s["momentum"] * m if s["nesterov"] else m
    return step + layer.decay * layer.weights


def adam(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    return adam_direction(layer, g + layer.decay * layer.weights, t, s)


def adamw(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    return adam_direction(layer, g, t, s) + layer.decay * layer.weights


def lamb(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    step = adamw(layer, g, t, s)
    return step * np.linalg.norm(layer.weights) / np.linalg.norm(step)


def lion(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    mixed = s["b1"] * layer.state.get("m", 0.0) + (1 - s["b1"]) * g
    layer.moment("m", s["b2"], g, 1 - s["b2"])
    return np.sign(mixed) + layer.decay * layer.weights


def adafactor(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    """Shazeer and Stern 2018, algorithms 4 (matrices) and 5 (vectors); T5's momentum."""
    rate = 1 - t ** -s["b2"]
    square = g**2 + s["eps"]
    if g.ndim == 2 and min(g.shape) >= 128:
        rows = layer.moment("rows", rate, square.mean(1), 1 - rate)
        columns = layer.moment("columns", rate, square.mean(0), 1 - rate)
        v = np.outer(rows, columns) / rows.mean()
    else:
        v = layer.moment("v", rate, square, 1 - rate)
    step = g / np.sqrt(v)
    step = step / max(1.0, np.sqrt((step**2).mean()))
    step = step * max(1e-3, np.sqrt((layer.weights**2).mean()))
    if s["b1"]:
        step = layer.moment("m", s["b1"], step, 1 - s["b1"])
    return step + layer.decay * layer.weights


def newton_schulz(x: Array) -> Array:
    x = x / np.linalg.norm(x)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x - 4.7750 * product @ x + 2.0315 * product @ product @ x
    return x


# Five polynomials a x + b x^3 + c x^5; Amsel et al. 2025, listing of "The Polar Express".
A = (8.28721201814563, 4.107059111542203, 3.9486908534822946, 3.3184196573706015, 2.300652019954817)
B = (-23.595886519098837, -2.9478499167379106, -2.908902115962949, -2.488488024314874,
     -1.6689039845747493)  # fmt: skip
C = (17.300387312530933, 0.5448431082926601, 0.5518191394370137, 0.51004894012372,
     0.4188073119525673)  # fmt: skip


def polar_express(x: Array) -> Array:
    u, values, v = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
    for a, b, c in zip(A, B, C, strict=True):
        values = a * values + b * values**3 + c * values**5
    return (u * values) @ v


def muon(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    if not layer.is_matrix:
        return adamw(layer, g, t, s)
    m = layer.moment("m", s["momentum"], g, 1.0)
    step = g + s["momentum"] * m if s["nesterov"] else m
    step = polar_express(step) if s.get("polar_express") else newton_schulz(step)
    if rate := s.get("neuron_b2"):  # an [in, out]; Li et al. 2025, algorithm 1
        neurons = layer.moment("neurons", rate, (step**2).mean(0), 1 - rate)
        step = step / np.sqrt(neurons)
        step = 0.2 * np.sqrt(step.size) * step / np.linalg.norm(step)
    else:
        step = 0.2 * np.sqrt(max(g.shape)) * step
    return step + layer.decay * layer.weights


def dion(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    """Ahn et al. 2025, algorithm 1."""
    if not layer.is_matrix:
        return adamw(layer, g, t, s)
    rank = max(1, round(s["rank_fraction"] * min(g.shape)))
    right = layer.state.get("right", np.eye(g.shape[1], rank))
    buffer = layer.state.get("m", 0.0) + g
    left, _ = np.linalg.qr(buffer @ right)
    projected = buffer.T @ left
    layer.state["m"] = buffer - (1 - s["momentum"]) * left @ projected.T
    layer.state["right"] = projected / np.linalg.norm(projected, axis=0)
    step = 0.2 * np.sqrt(g.size / rank) * left @ layer.state["right"].T
    return step + layer.decay * layer.weights


def soap(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    """Vyas et al. 2024, algorithms 3 and 4, with the sorted eigenvectors of the authors' code."""
    if not layer.is_matrix:
        return adamw(layer, g, t, s)
    state, sides = layer.state, (g @ g.T, g.T @ g)
    step = np.zeros_like(g)
    if t > 1:
        left, right = state["bases"]
        m = layer.moment("m", s["b1"], g, 1 - s["b1"])
        v = layer.moment("v", s["b2"], (left.T @ g @ right) ** 2, 1 - s["b2"])
        m, v = m / (1 - s["b1"] ** (t - 1)), v / (1 - s["b2"] ** (t - 1))
        step = left @ (left.T @ m @ right / (np.sqrt(v) + s["eps"])) @ right.T
    means = [layer.moment(f"side {n}", s["b2"], x, 1 - s["b2"]) for n, x in enumerate(sides)]
    if t == 1:
        state["bases"] = [np.linalg.eigh(mean)[1][:, ::-1] for mean in means]
    elif (t - 1) % s["precondition_every"] == 0:
        for n, mean in enumerate(means):
            basis = state["bases"][n]
            order = np.argsort(-np.diag(basis.T @ mean @ basis))
            state["bases"][n] = np.linalg.qr(mean @ basis[:, order])[0]
            state["v"] = state["v"].take(order, axis=n)
    return step + layer.decay * layer.weights


def schedule_free_adamw(layer: Layer, g: Array, t: int, s: Settings) -> Array:
    """Return the direction of z; ``layer.weights`` is y, where gradient and decay are evaluated."""
    v = layer.moment("v", s["b2"], g**2, 1 - s["b2"])
    return g / (np.sqrt(v / (1 - s["b2"] ** t)) + s["eps"]) + layer.decay * layer.weights


DIRECTIONS = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "lamb": lamb,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
    "dion": dion,
    "soap": soap,
    "schedule_free_adamw": schedule_free_adamw,
}


@dataclass(kw_only=True)
class Textbook:
    """An optimizer with clipping, decay, schedule and averaging."""

    name: str
    settings: Settings
    rate: Callable[[int], float]
    clip_norm: float | None = None
    clip_value: float | None = None
    clip_adaptive: float | None = None
    ema_decay: float | None = None

    def train(
        self, layers: Sequence[Layer], gradients: Sequence[Arrays]
    ) -> tuple[list[Arrays], list[Arrays]]:
        """Return parameters and parameters to evaluate, after each update."""
        shapes = {path: g.shape for path, g in gradients[0].items()}
        trained, evaluated = [], []
        greatest_rate = sum_of_weights = 0.0
        for step, gradient in enumerate(gradients):
            g = self.clipped(
                [gradient[each.path][each.index].astype(float) for each in layers], layers
            )
            rate = self.rate(step)
            greatest_rate = max(greatest_rate, rate)
            sum_of_weights += greatest_rate**2
            for layer, each in zip(layers, g, strict=True):
                direction = DIRECTIONS[self.name](layer, each, step + 1, self.settings)
                change = -rate * layer.rate_scale * direction
                if self.name == "schedule_free_adamw":
                    self.average_z(layer, change, greatest_rate**2 / sum_of_weights)
                else:
                    layer.weights = layer.weights + change
                if self.ema_decay is not None:
                    layer.state.setdefault("past", []).append(layer.weights)
            trained.append(join({(e.path, e.index): e.weights for e in layers}, shapes))
            evaluated.append(join({(e.path, e.index): self.evaluated(e) for e in layers}, shapes))
        return trained, evaluated

    def clipped(self, g: list[Array], layers: Sequence[Layer]) -> list[Array]:
        if self.clip_value is not None:
            g = [np.clip(each, -self.clip_value, self.clip_value) for each in g]
        if self.clip_adaptive is not None:
            g = [
                unitwise(each, layer.weights, self.clip_adaptive)
                for each, layer in zip(g, layers, strict=True)
            ]
        if self.clip_norm is not None:
            norm = float(np.sqrt(sum((each**2).sum() for each in g)))
            g = [each * min(1.0, self.clip_norm / norm) for each in g]
        return g

    def average_z(self, layer: Layer, change: Array, weight: float) -> None:
        """Defazio et al. 2024, algorithm 1, with x and z kept and y made of them."""
        old = {"x": layer.weights, "z": layer.weights, **layer.state}
        z = old["z"] + change
        x = (1 - weight) * old["x"] + weight * z
        layer.state.update(x=x, z=z)
        layer.weights = (1 - self.settings["b1"]) * z + self.settings["b1"] * x

    def evaluated(self, layer: Layer) -> Array:
        if self.ema_decay is None:
            return layer.state.get("x", layer.weights)
        weights = self.ema_decay ** np.arange(len(layer.state["past"]))[::-1]
        return np.tensordot(weights / weights.sum(), np.stack(layer.state["past"]), 1)


def unitwise(g: Array, weights: Array, largest: float) -> Array:
    """Brock et al. 2021, equation 3; a unit's weights are a column of [in, out], or a bias."""
    axis = 0 if g.ndim == 2 else None
    norm = np.sqrt((g**2).sum(axis, keepdims=True))
    bound = largest * np.maximum(np.sqrt((weights**2).sum(axis, keepdims=True)), 1e-3)
    return np.where(norm > bound, g * bound / norm, g)


def split(params: Arrays, stack_axes: Mapping[str, int], **kwargs: Settings) -> list[Layer]:
    """Split parameters into layers; `kwargs` are fields of the layers, by path."""
    return [
        Layer(
            path,
            index,
            array[index].astype(float),
            **{name: values[path] for name, values in kwargs.items() if path in values},
        )
        for path, array in params.items()
        for index in np.ndindex(array.shape[: stack_axes[path]])
    ]


def join(layers: Mapping[tuple[str, tuple[int, ...]], Array], shapes: Settings) -> Arrays:
    """Stack layers to parameters."""
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    for (path, index), weights in layers.items():
        arrays[path][index] = weights
    return arrays
