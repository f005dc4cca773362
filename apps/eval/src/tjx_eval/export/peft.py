"""Export the adapters of a run in the format of Hugging Face PEFT."""

from pathlib import Path

import jax

from tjx_eval.errors import EvalError
from tjx_eval.load_model import TrainedModel
from tjx_nn import lora


def export_adapters(model: TrainedModel, folder: Path) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors; return their names.

    Raises
    ------
    EvalError
        If the model is no run with adapters, or no family of Transformers represents it.
    """
    if model.run is None:
        raise EvalError(f"{model.path}: got a Transformers model; expected a run with --lora.rank")
    try:
        adapters, _ = model.run.load_adapters(model.mesh, model.step)
        lora.save(folder, model.architecture, model.run.config.lora, jax.device_get(adapters))
    except ValueError as error:
        raise EvalError(" ".join(str(error).split())) from error
    return sorted(file.name for file in folder.iterdir())
