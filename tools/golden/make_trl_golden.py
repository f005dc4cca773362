"""Write golden losses: SFT, DPO, GRPO, Dr. GRPO and DAPO of TRL on random logits.

Each file holds logits, token ids and masks of responses, the other arguments, and TRL's loss and
its gradient with respect to the logits, float64: `trl.npz` for tjx-rl, and `trl_sft.npz` for the
loss of fine-tuning, which tjx-nn computes.

Run it in a separate environment with trl (see README.md):

    python make_trl_golden.py ../../packages
"""

import argparse
import collections
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

ROWS, TOKENS, VOCAB = 6, 5, 11
LENGTHS = (5, 2, 4, 1, 3, 5)
MAX_LENGTH = 8
BETA, LOW, HIGH = 0.3, 0.2, 0.28


class Accelerator:
    """The accelerator of one process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = False
    parallelism_config = None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself."""
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:  # noqa: ARG002  TRL's name
        """Return the tensor itself."""
        return x


def no_metrics() -> dict[str, dict[str, list[float]]]:
    """Return a mapping to which the trainers append their metrics."""
    return collections.defaultdict(lambda: collections.defaultdict(list))


def log_probs_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token."""
    return torch.gather(logits.log_softmax(-1), -1, ids[..., None])[..., 0]


def grpo(kind: str, logits: torch.Tensor, given: dict[str, torch.Tensor], beta: float) -> Any:
    """Return the loss that TRL's GRPOTrainer computes."""
    log_probs = log_probs_of(logits, given["ids"])
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, log_probs.detach(), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=beta, loss_type=kind, epsilon_low=LOW,
        epsilon_high=HIGH, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH, _entropy_bonus_enabled=False, accelerator=Accelerator(),
        model=SimpleNamespace(training=True), _metrics=no_metrics(),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    )  # fmt: skip
    empty = torch.zeros(ROWS, 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": given["ids"],
        "completion_mask": given["mask"], "advantages": given["advantages"],
        "old_per_token_logps": given["old"], "ref_per_token_logps": given["reference"],
        "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def dpo(logits: torch.Tensor, given: dict[str, torch.Tensor]) -> Any:
    """Return the loss that TRL's DPOTrainer computes; the first half of the rows is preferred."""
    mask = torch.cat([torch.zeros(ROWS, 1, dtype=torch.long), given["mask"]], 1)
    zeros = torch.zeros(ROWS, TOKENS, dtype=torch.float64)

    def model(**_: Any) -> Any:
        log_probs = log_probs_of(logits, given["ids"]) * given["mask"]
        return SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    reference = (given["reference"] * given["mask"]).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=Accelerator(), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], beta=BETA, use_weighting=False,
        _total_train_tokens=0, _metrics=no_metrics(),
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(ROWS, TOKENS + 1, dtype=torch.long), "completion_mask": mask,
        "attention_mask": mask, "ref_chosen_logps": reference[: ROWS // 2],
        "ref_rejected_logps": reference[ROWS // 2 :],
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def sft(logits: torch.Tensor, given: dict[str, torch.Tensor]) -> Any:
    """Return the loss that TRL's SFTTrainer computes; the mask selects the labels."""
    log_probs = log_probs_of(logits, given["ids"]) * given["mask"]
    zeros = torch.zeros(ROWS, TOKENS, dtype=torch.float64)

    def model(**_: Any) -> Any:
        return SimpleNamespace(
            log_probs=log_probs, label_mask=given["mask"], entropy=zeros, is_top1=zeros.bool()
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=Accelerator(), aux_loss_enabled=False,
        compute_loss_func=None, label_smoother=None, _total_train_tokens=0, _metrics=no_metrics(),
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
    )  # fmt: skip
    return SFTTrainer.compute_loss(trainer, model, {"input_ids": given["ids"]})


def main() -> None:
    """Write the files below the given folder of packages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = normal(ROWS, TOKENS, VOCAB)
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=generator)
    mask = (torch.arange(TOKENS)[None] < torch.tensor(LENGTHS)[:, None]).long()
    near = log_probs_of(logits, ids)
    given = {
        "ids": ids, "mask": mask, "advantages": normal(ROWS),
        "old": near + 0.4 * normal(ROWS, TOKENS), "reference": near + 0.4 * normal(ROWS, TOKENS),
    }  # fmt: skip
    write(
        folder / "tjx-rl" / "tests" / "golden" / "trl.npz",
        {"logits": logits, **given},
        {
            "dpo": lambda x: dpo(x, given),
            **{
                f"{kind}_kl" if beta else kind: lambda x, k=kind, b=beta: grpo(k, x, given, b)
                for kind in ("grpo", "dr_grpo", "dapo")
                for beta in (0.0, BETA)
            },
        },
    )
    write(
        folder / "tjx-nn" / "tests" / "golden" / "trl_sft.npz",
        {"logits": logits, "ids": ids, "mask": mask},
        {"sft": lambda x: sft(x, given)},
    )


def write(
    path: pathlib.Path,
    given: dict[str, torch.Tensor],
    losses: dict[str, Callable[[torch.Tensor], Any]],
) -> None:
    """Write arrays, and losses with their gradients with respect to the logits."""
    found = dict(given)
    for name, loss in losses.items():
        x = given["logits"].clone().requires_grad_()
        value = loss(x)
        value.backward()
        found |= {f"{name}_loss": value.detach(), f"{name}_gradient": x.grad}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: array.numpy() for name, array in found.items()})


if __name__ == "__main__":
    main()
