"""Public API of the trainer for programs that read run directories, such as `tjx-eval`.

`SavedRun` reads the config, parameters and data of a run, and evaluates its validation data as
during training. The other names are what such programs need to sample from and to shard a model.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import tjx_ckpt
import tjx_data
import tjx_nn
import tjx_parallel
from tjx_metrics import Evaluation
from tjx_nn.models.gpt_config import GPTConfig
from tjx_parallel.config import MeshConfig
from tjx_trainer.config.run_config import Config, ModelConfig, reads_text
from tjx_trainer.rl.examples import Example, read_prompts
from tjx_trainer.runtime.allocator import retain_freed_memory
from tjx_trainer.runtime.run_dir import RunDirectory
from tjx_trainer.tasks.causal_lm import CausalLMTask
from tjx_trainer.tasks.registry import open_task
from tjx_trainer.tasks.sampling import SamplingParams, generation_inputs
from tjx_trainer.tasks.task import DataShard, Task
from tjx_trainer.tasks.text_data import TextData, open_text
from tjx_trainer.tasks.text_stream import TextStream, decode_text
from tjx_trainer.training.build import make_update_rule
from tjx_trainer.training.evaluation import evaluate, make_eval_step
from tjx_trainer.training.mesh_layout import make_layout
from tjx_trainer.training.train_state import abstract_state, eval_params

__all__ = [
    "Config",
    "Example",
    "ModelConfig",
    "SamplingParams",
    "SavedRun",
    "TextData",
    "TextStream",
    "decode_text",
    "generation_inputs",
    "model_layout",
    "read_prompts",
    "reads_text",
    "retain_freed_memory",
]


class SavedRun:
    """A run directory, opened for reading only.

    Parameters
    ----------
    path : Path
        Run directory of the trainer.

    Attributes
    ----------
    path : Path
        Run directory.
    config : Config
        Resolved config of the run, with the default mesh instead of the one of training.

    Raises
    ------
    tjx_core.ConfigError
        If config.yaml is invalid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = RunDirectory(path)
        config = self._directory.read_config()
        self.config: Config = dataclasses.replace(config, mesh=MeshConfig())

    @property
    def tokenizer_file(self) -> Path:
        """Path of tokenizer.json; the file may be missing."""
        return self._directory.tokenizer

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that prepared the training data; None if unknown."""
        pointer = self._directory.read_data_pointer()
        fingerprint = None if pointer is None else pointer.identity.get("tokenizer")
        return None if fingerprint is None else str(fingerprint)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, in ascending order."""
        return list(tjx_ckpt.list_steps(self._directory.checkpoint_location(self.config)))

    def load_params(
        self, mesh: jax.sharding.Mesh, step: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """Load the parameters for evaluation: the optimizer's average if it keeps one.

        Adapters are merged into the model's parameters.

        Parameters
        ----------
        mesh : jax.sharding.Mesh
            Devices of the parameters.
        step : int, optional
            Checkpoint step; by default the newest valid checkpoint.

        Returns
        -------
        nested dict of float32 arrays, and int
            Parameters, and the step of the checkpoint.

        Raises
        ------
        tjx_ckpt.CheckpointError
            If the checkpoint is damaged.
        """
        restored = self._restore(mesh, step, with_base=True)
        params = eval_params(
            self.config, restored["params"], restored.get("opt_state"), restored.get("base")
        )
        return params, int(jax.device_get(restored["step"]))

    def load_average(self, mesh: jax.sharding.Mesh, steps: Sequence[int]) -> dict[str, Any]:
        """Load the mean of the parameters of several checkpoints, summed in float32.

        Averages of the last checkpoints are LAWA (Kaddour 2022, "Stop Wasting My Time!").

        Parameters
        ----------
        mesh : jax.sharding.Mesh
            Devices of the parameters.
        steps : sequence of int
            Steps of the checkpoints.

        Returns
        -------
        nested dict of float32 arrays
            Mean of what `load_params` returns for each step.

        Raises
        ------
        tjx_ckpt.CheckpointError
            If a checkpoint is missing or damaged, or its names, shapes or dtypes differ from those
            of the run's config.
        """
        add = jax.jit(lambda *trees: jax.tree.map(_add_float32, *trees), donate_argnums=0)
        total, _ = self.load_params(mesh, steps[0])
        dtypes = jax.tree.map(lambda x: x.dtype, total)
        for step in steps[1:]:
            total = add(total, self.load_params(mesh, step)[0])
        mean: dict[str, Any] = jax.jit(
            lambda sums: jax.tree.map(lambda x, dtype: (x / len(steps)).astype(dtype), sums, dtypes)
        )(total)
        return mean

    def load_adapters(
        self, mesh: jax.sharding.Mesh, step: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """Load the adapters of a run with ``lora.rank``; as `load_params`, without merging.

        Raises
        ------
        ValueError
            If the run has no adapters.
        """
        if self.config.lora.rank is None:
            raise ValueError(
                f"{self.path}: got a run without adapters; expected one with --lora.rank"
            )
        restored = self._restore(mesh, step, with_base=False)
        adapters = eval_params(self.config, restored["params"], restored.get("opt_state"))
        return adapters, int(jax.device_get(restored["step"]))

    def _restore(self, mesh: jax.sharding.Mesh, step: int | None, *, with_base: bool) -> Any:
        """Read the parts of a checkpoint that evaluation needs."""
        _, optimizer = make_update_rule(self.config)
        abstract = abstract_state(self.config, optimizer, mesh, tjx_parallel.ShardingRules())
        # The optimizer state, twice the size of the parameters, is read only for its average.
        wanted = {"step": abstract.step, "params": abstract.params}
        if self.config.optimizer.averages:
            wanted["opt_state"] = abstract.opt_state
        if with_base and abstract.base is not None:
            wanted["base"] = abstract.base
        location = self._directory.checkpoint_location(self.config)
        return tjx_ckpt.Checkpointer(location).restore(wanted, step, partial=True)

    def prepared_text(self, tokenizer: tjx_data.Tokenizer) -> TextData:
        """Return the prepared text of the run, preparing it again if the cache is gone.

        Parameters
        ----------
        tokenizer : tjx_data.Tokenizer
            The run's tokenizer.
        """
        if self.config.data.reads_tokens:
            return TextData({}, tokenizer)
        pointer = self._directory.read_data_pointer()
        if pointer is not None and all(
            (folder / "index.json").is_file() for folder in pointer.folders.values()
        ):
            return TextData(pointer.folders, tokenizer)
        return open_text(self.config)

    def evaluate(
        self,
        model: ModelConfig,
        params: dict[str, Any],
        mesh: jax.sharding.Mesh,
        *,
        tokenizer: tjx_data.Tokenizer | None,
        ks: tuple[int, ...],
        batch_size: int | None = None,
        max_tokens: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> tuple[Evaluation, float]:
        """Evaluate parameters once over the validation data.

        Parameters
        ----------
        model : ModelConfig
            Model config.
        params : nested dict of arrays
            Parameters on `mesh`.
        mesh : jax.sharding.Mesh
            Devices.
        tokenizer : tjx_data.Tokenizer or None
            The run's tokenizer; required for a decoder.
        ks : tuple of int
            Values of k for the top-k accuracy of a decoder; other families have their own.
        batch_size : int, optional
            Examples per batch over all devices, by default that of the run; does not change
            results.
        max_tokens : int, optional
            Stop after this many tokens (or images).
        on_batch : callable, optional
            Called with the number of labels so far.

        Returns
        -------
        Evaluation, and float
            Sums over the validation data, and seconds without compilation.
        """
        data = self.config.data  # the training documents of a stream are not opened
        config = dataclasses.replace(
            self.config,
            train=dataclasses.replace(self.config.train, eval_tokens=max_tokens),
            data=data.stream_sample if data.stream else data,
        )
        rows = -(-(batch_size or config.train.batch_size) // mesh.size) * mesh.size
        shard = DataShard(rows, rows, *tjx_parallel.batch_process(mesh))
        task: Task
        is_decoder = config.task is None and isinstance(config.model, GPTConfig)
        if is_decoder:
            assert tokenizer is not None
            task = CausalLMTask(config, self.prepared_text(tokenizer), shard)
        else:
            config, make_task = open_task(config)
            task = make_task(shard)
        step = make_eval_step(
            model,
            ks=ks if is_decoder else task.accuracies,
            metrics=config.log.metrics,
            token_byte_lengths=task.token_byte_lengths,
            layout=model_layout(model, mesh),
        )

        def put(batch: Any) -> Any:
            return tjx_parallel.shard_batch(mesh, batch)

        def batches(limit: int | None) -> Iterator[Any]:
            done = 0
            for number, batch in enumerate(task.evaluation_batches(put)):
                if number == limit:
                    return
                yield batch
                done += batch["labels"].size
                if on_batch is not None:
                    on_batch(done)

        with jax.transfer_guard("allow"):
            evaluate(step, params, batches(1))  # compile outside of the measured time
            started = time.perf_counter()
            evaluation = evaluate(step, params, batches(None))
            seconds = time.perf_counter() - started
        return evaluation, seconds


def _add_float32(x: jax.Array, y: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) + y.astype(jnp.float32)


def model_layout(model: ModelConfig, mesh: jax.sharding.Mesh) -> tjx_nn.Layout:
    """Return how a model is sharded over a mesh with the default sharding rules."""
    return make_layout(model, mesh, tjx_parallel.ShardingRules(), MeshConfig())
