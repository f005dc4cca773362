"""Load folders saved by tjx_nn.hf with transformers; check the keys and compare the logits.

write_saved.py creates the folders. Run this script in the environment of transformers (README.md):

    python check_saved.py /tmp/saved
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers

CLASSES = {
    "bert": transformers.AutoModelForMaskedLM,
    "modernbert": transformers.AutoModelForMaskedLM,
    "vit": transformers.AutoModelForImageClassification,
    "bart": transformers.AutoModelForSeq2SeqLM,
    "siglip": transformers.SiglipForImageClassification,
    "siglip_vision_model": transformers.SiglipVisionModel,
    "Dinov2Model": transformers.Dinov2Model,
    "Dinov2WithRegistersModel": transformers.Dinov2WithRegistersModel,
    "dinov2": transformers.AutoModelForImageClassification,
    "dinov2_with_registers": transformers.AutoModelForImageClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
SEQ2SEQ = {"source": "input_ids", "source_mask": "attention_mask", "tokens": "decoder_input_ids"}
# Names of the input arguments in transformers.
NAMES = {
    "bert": {"tokens": "input_ids", "token_types": "token_type_ids", "mask": "attention_mask"},
    "modernbert": {"tokens": "input_ids", "mask": "attention_mask"},
    "bart": SEQ2SEQ,
    "t5": SEQ2SEQ,
}
ATOL = 1e-5


def check(folder: pathlib.Path) -> float:
    """Return the largest logit difference; AssertionError on missing or unexpected keys."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = config.model_type
    # Models without a head have the model_type of those with one.
    model_class = CLASSES.get(kind, transformers.AutoModelForCausalLM)
    found = CLASSES.get(config.architectures[0], model_class).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    model, info = found
    assert not any(info.values()), f"{folder}: {info}"
    with np.load(folder / "ours.npz") as file:
        ours = dict(file)
    logits = torch.from_numpy(ours.pop("logits"))
    if "images" in ours:
        given = {"pixel_values": torch.from_numpy(ours["images"]).permute(0, 3, 1, 2)}
    else:
        names = NAMES.get(kind, {"tokens": "input_ids"})
        given = {names[name]: torch.from_numpy(x).long() for name, x in ours.items()}
    with torch.no_grad():
        output = model.eval()(**given)
        expected = output.logits if "logits" in output else output.last_hidden_state
        difference = (expected - logits).abs()
    if kind in ("bert", "modernbert"):  # outputs at padding are undefined
        difference = difference[given["attention_mask"] > 0]
    return difference.max().item()


def main() -> None:
    """Check every model folder in the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=pathlib.Path)
    worst = 0.0
    for config in sorted(parser.parse_args().folders.glob("*/config.json")):
        worst = max(worst, difference := check(config.parent))
        print(
            f"{config.parent.name}: no missing or unexpected keys, "
            f"logits differ by {difference:.1e}"
        )
    assert 0 < worst < ATOL, worst


if __name__ == "__main__":
    main()
