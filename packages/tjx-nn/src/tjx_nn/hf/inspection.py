"""Inspection of a transformers checkpoint: whether tjx supports it, without reading its weights."""

from pathlib import Path
from typing import NamedTuple

from tjx_nn.binding import param_shapes
from tjx_nn.config import TransformerConfig
from tjx_nn.hf.convert_params import check_tensors, resolve_head, tensor_slots
from tjx_nn.hf.hub import find
from tjx_nn.hf.load_save import read_family_config
from tjx_nn.hf.safetensors_folder import CONFIG, Tensors, has_weights, read_json


class Inspection(NamedTuple):
    """Result of `inspect`: family, configuration, errors and size of a checkpoint.

    Attributes
    ----------
    model_type, architecture
        Names of the family in config.json; "unknown" if they are missing.
    config
        Configuration of the model; None if its config.json is not supported.
    problems
        A line for each reason that `load` would raise for; empty if it would load.
    stored_bytes
        Size of the safetensors files [bytes]; 0 for a folder with config.json only, whose weights
        are not compared.
    """

    model_type: str
    architecture: str
    config: TransformerConfig | None
    problems: tuple[str, ...]
    stored_bytes: int


def inspect(path_or_hub_name: str | Path, *, revision: str | None = None) -> Inspection:
    """Compare config.json, and names and shapes of tensors, with the families that tjx supports.

    Weights are read only where a checkpoint stores a tied tensor twice.

    Parameters
    ----------
    path_or_hub_name, revision
        As for `load`.

    Raises
    ------
    ValueError
        If there is no config.json, or it is no JSON object.

    Examples
    --------
    >>> import jax, tempfile
    >>> from tjx_nn import GPTConfig, hf, init
    >>> config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=2, n_head=2, d_model=4)
    >>> folder = tempfile.mkdtemp()
    >>> hf.save(folder, config, init(config, jax.random.key(0)))
    >>> found = hf.inspect(folder)
    >>> found.model_type, found.problems
    ('gpt2', ())
    """
    folder = find(path_or_hub_name, revision)
    config_json = read_json(folder / CONFIG)
    architectures = config_json.get("architectures")
    architecture = (
        str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    )
    config, problems = None, []
    try:
        family, config, quantization = read_family_config(config_json)
        if has_weights(folder):
            with Tensors(folder, quantization=quantization) as tensors:
                config = resolve_head(family, config, tensors)
                check_tensors(family, tensors, tensor_slots(family, config, param_shapes(config)))
    except ValueError as error:
        problems = str(error).splitlines()
    return Inspection(
        model_type=str(config_json.get("model_type", "unknown")),
        architecture=architecture or "unknown",
        config=config,
        problems=tuple(problems),
        stored_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
