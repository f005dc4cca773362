"""Ahead-of-time compilation of a run's training step, and its figures for a plan."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import tjx_parallel
from tjx_nn.models.bert_config import BertConfig
from tjx_nn.models.encoder_decoder_config import EncoderDecoderConfig
from tjx_nn.models.gpt_config import GPTConfig
from tjx_nn.models.vit_config import ViTConfig
from tjx_parallel.planning.chips import Chip
from tjx_parallel.planning.collectives import collectives
from tjx_parallel.planning.step_time import StepProfile
from tjx_parallel.roofline import Estimate, assumptions_for, estimate
from tjx_trainer.config.run_config import GPT2_VOCAB_SIZE, Config
from tjx_trainer.distillation.teacher import teacher_inputs
from tjx_trainer.planning.topology import TargetUnavailableError, topology_devices
from tjx_trainer.training.build import StepComponents, build_step_components
from tjx_trainer.training.step_timer import model_flops
from tjx_trainer.training.train_state import bytes_on_device

# Memory and collectives do not depend on code quality. Keep 16-bit types: the CPU compiler would
# otherwise widen the collectives to 32 bits.
_CHEAP = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": "float-normalization-bf16",
}
# Extra forward passes of full rematerialization, as a fraction of the FLOPs of a step.
_RECOMPUTED = {"full": 1 / 3}


class PlannedStep(NamedTuple):
    """A compiled training step with its figures.

    Attributes
    ----------
    step : Step
        Memory, FLOPs and collectives.
    notes : list of str
        The compiler that was used, and assumptions.
    estimate : Estimate or None
        Time of each kernel; None if the chip's own compiler is not installed.
    hlo : str
        Optimized HLO as text.
    """

    step: StepProfile
    notes: list[str]
    estimate: Estimate | None
    hlo: str


def plan_step(config: Config, chip: Chip, device_count: int) -> PlannedStep:
    """Compile the training step of a run for a number of devices and measure it.

    Parameters
    ----------
    config : Config
        From the command line.
    chip : Chip
        The target; without its compiler the step is compiled for CPUs.
    device_count : int
        Devices in the mesh.

    Raises
    ------
    ValueError
        If the configuration does not fit the devices.
    """
    config, notes = with_vocabulary(config)
    if config.train.phases is not None:
        notes.append("the step before the first phase; to plan a phase, give its values as flags")
    cpus = cpu_devices(device_count)
    found = None
    try:
        devices = topology_devices(chip, device_count)
        parts, compiled = _compile(config, devices)
        hlo = compiled.as_text()
        notes.append(f"compiled by the compiler of {chip.name}: the memory figures are exact")
        if parts.mesh.shape["stage"] > 1:
            notes.append(
                "time by formula: the program of a pipeline does not show when each stage computes"
            )
        else:
            visible = attention_visible(config)
            assumptions = assumptions_for(chip, attention_visible=visible)
            found = estimate(hlo, chip, assumptions, mesh_shape=dict(parts.mesh.shape))
    except TargetUnavailableError as reason:
        try:
            parts, compiled = _compile(config, cpus, _CHEAP)
        except ValueError as error:  # such as an attention kernel without a CPU version
            if reason.__cause__ is None:
                raise
            raise ValueError(f"{error} (compiled for the CPU, as {reason})") from error
        hlo = compiled.as_text()
        notes.append(
            f"compiled for the CPU, as {reason}: time by formula, temporaries 1.1 to 1.6 times a "
            "GPU's"
        )
    if found is None and config.train.precision == "fp32":
        notes.append("train.precision is fp32, the peak FLOP/s are for bf16: it takes longer")
    return PlannedStep(_figures(config, parts, compiled, hlo, found), notes, found, hlo)


def with_vocabulary(config: Config) -> tuple[Config, list[str]]:
    """Return the configuration with its tokenizer's vocabulary, and a note if it is assumed."""
    model = config.model
    if not config.train.vocab_from_tokenizer:
        return config, []
    kind = config.data.tokenizer_kind
    size = {"gpt2": GPT2_VOCAB_SIZE, "bpe": config.data.vocab_size}.get(kind)
    if size is not None and isinstance(model, GPTConfig | BertConfig):
        # BERT adds the mask token.
        return config.with_vocabulary(size + isinstance(model, BertConfig)), []
    if isinstance(model, GPTConfig | BertConfig | EncoderDecoderConfig):
        return config, [f"assumed a vocabulary of {model.vocab_size} (it depends on the data)"]
    return config, []


def cpu_devices(count: int) -> list[jax.Device]:
    """Return `count` CPU devices for compilation.

    Raises
    ------
    ValueError
        If JAX is already initialized with fewer.
    """
    settings: dict[str, Any] = {
        "jax_platforms": "cpu",
        "jax_num_cpu_devices": max(count, jax.config.jax_num_cpu_devices),
    }
    try:
        for name, value in settings.items():
            jax.config.update(name, value)  # type: ignore[no-untyped-call]  # as jax is
    except RuntimeError:  # JAX is already initialized
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"mesh: got {count} devices; expected at most {len(devices)}, with which JAX was "
            "initialized; plan it in a new process"
        )
    return devices[:count]


def abstract_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return shapes, dtypes and shardings of a batch, by argument name of the model's losses."""
    model, rows, length = config.model, config.train.batch_size, config.data.seq_len
    ids: tuple[tuple[int, ...], type] = (rows, length), np.int32
    arrays = {"tokens": ids, "labels": ids}
    if isinstance(model, ViTConfig):
        images = (rows, *model.height_width, model.channels)
        arrays = {"images": (images, np.float32), "labels": ((rows,), np.int32)}
    elif isinstance(model, EncoderDecoderConfig):
        # Source and target are at most as long as a row of text.
        arrays |= {"source": ids, "source_mask": ((rows, length), np.bool_)}
    elif config.data.packing == "documents":
        arrays |= {"segment_ids": ids, "positions": ids}
    abstract: Any = jax.ShapeDtypeStruct  # JAX gives no types
    sharding = tjx_parallel.batch_sharding(mesh)
    return {name: abstract(*array, sharding=sharding) for name, array in arrays.items()}


def lower_step(config: Config, devices: Sequence[jax.Device]) -> tuple[StepComponents, Any]:
    """Return the components of a run and its training step, lowered for the given devices."""
    with jax.default_device(devices[0]):  # kernels are selected for it
        parts = build_step_components(config, devices)
        jitted: Any = parts.train_step
        batch = {**abstract_batch(config, parts.mesh), **teacher_inputs(parts.teacher)}
        return parts, jitted.lower(parts.abstract, batch)


def _compile(
    config: Config, devices: Sequence[jax.Device], options: Any = None
) -> tuple[StepComponents, Any]:
    try:
        parts, lowered = lower_step(config, devices)
        return parts, lowered.compile(compiler_options=options)
    except RuntimeError as error:  # JAX raises it too, if cuDNN is not installed
        if devices[0].platform == "cpu":
            raise
        raise TargetUnavailableError(
            f"its compiler raised {str(error)[:200]!r} (--model.attention_implementation chooses "
            "the attention kernel)"
        ) from error


def attention_visible(config: Config) -> float:
    """Return the visible fraction of query-key pairs, averaged over layers.

    Packed documents and padding are not counted.
    """
    model, length = config.model, config.data.seq_len
    if isinstance(model, ViTConfig | BertConfig):
        return 1.0
    shares = [
        sum(min(query + 1, window or length) for query in range(length)) / length**2
        for window in model.windows
    ]
    if isinstance(model, EncoderDecoderConfig):  # encoder and cross attention are unmasked
        shares += [1.0] * (model.n_layer + len(model.encoder.windows))
    return sum(shares) / len(shares)


def _figures(
    config: Config, parts: StepComponents, compiled: Any, hlo: str, estimated: Estimate | None
) -> StepProfile:
    found, shape = compiled.memory_analysis(), dict(parts.mesh.shape)
    params, model = parts.abstract.params, config.model
    length = model.max_seq_len if isinstance(model, ViTConfig) else config.data.seq_len
    tokens = config.train.batch_size * length
    # Outputs that do not alias the donated state.
    fresh = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    wide = 4 if config.mesh.reduce_dtype == "float32" else 2
    return StepProfile(
        mesh_shape=shape,
        parameters=bytes_on_device((params, parts.abstract.base, teacher_inputs(parts.teacher))),
        optimizer=bytes_on_device(parts.abstract.opt_state),
        batch=bytes_on_device(abstract_batch(config, parts.mesh)),
        temporaries=found.temp_size_in_bytes + fresh,
        gradients=_numbers_on_device(params) * wide,
        flops=model_flops(config) * (1 + _RECOMPUTED.get(model.remat, 0.0)),
        tokens=tokens,
        sequences=config.train.batch_size,
        microbatches=parts.accumulation,
        exchanges=tuple(collectives(hlo, shape)),
        bubble=bubble(config, shape["stage"], parts.accumulation),
        compute_time=None if estimated is None else estimated.compute_time(),
    )


def bubble(config: Config, stages: int, microbatches: int) -> float:
    """Return the idle fraction of a pipeline stage: (p - 1) / (v m + p - 1).

    p stages, m microbatches, v model chunks per stage (Narayanan et al. 2021, section 2.2).
    """
    waiting = stages - 1
    return waiting / (config.mesh.chunks_per_stage * microbatches + waiting)


def _numbers_on_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
