"""The frozen teacher of a run: checks against the student, and parameters on the mesh."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import jax

import tjx_data
import tjx_nn
import tjx_parallel
from tjx_nn.models.gpt_config import GPTConfig
from tjx_trainer.config.run_config import Config
from tjx_trainer.tasks.task import HostBatch
from tjx_trainer.training.mesh_layout import make_layout
from tjx_trainer.training.pretrained import load_pretrained, params_digest
from tjx_trainer.training.train_state import Batch, TrainState


def with_teacher(config: Config, tokenizer: tjx_data.Tokenizer | None) -> Config:
    """Check the teacher against the data and the student, and record its digest.

    Parameters
    ----------
    config : Config
        With the vocabulary of the data; returned at once without ``distill.teacher``.
    tokenizer : tjx_data.Tokenizer or None
        The tokenizer of the data; None for token files without one.

    Returns
    -------
    Config
        With ``distill.teacher_sha256``.

    Raises
    ------
    ValueError
        If the teacher is no decoder with the student's tokenizer and vocabulary and the length of
        the rows, or not the one of ``distill.teacher_sha256``.
    """
    name = config.distill.teacher
    if name is None:
        return config
    student, (teacher, params) = config.model, load_pretrained(name)
    assert isinstance(student, GPTConfig)  # the configuration refuses other families
    if not isinstance(teacher, GPTConfig):
        raise ValueError(
            f"distill.teacher: got {name}, a model of the family {teacher.family}; expected a "
            "decoder (gpt); give one"
        )
    if tokenizer is None:
        raise ValueError(
            "data.tokenizer: got token files without a tokenizer; expected the tokenizer of "
            f"distill.teacher {name}, to compare them; give it"
        )
    theirs = tjx_data.Tokenizer.load(name)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"distill.teacher: got {name} with the tokenizer {theirs.fingerprint[:8]} of "
            f"{theirs.vocab_size:,} tokens; expected {tokenizer.fingerprint[:8]} of "
            f"{tokenizer.vocab_size:,} tokens, that of the data; give --data.tokenizer {name}"
        )
    sizes = [model.tokenizer_size or model.vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"distill.teacher: got {name} with a vocabulary of {sizes[0]:,}; expected "
            f"{sizes[1]:,}, that of the student; give --model.vocab_size {teacher.vocab_size}"
        )
    if teacher.max_seq_len < config.data.seq_len:
        raise ValueError(
            f"data.seq_len: got {config.data.seq_len}; expected at most {teacher.max_seq_len}, the "
            f"max_seq_len of distill.teacher {name}; give a shorter --data.seq_len"
        )
    digest = params_digest(params, describe_model(teacher))
    if config.distill.teacher_sha256 not in (None, digest):
        raise ValueError(
            f"distill.teacher: got {name} with the SHA-256 {digest}; expected "
            f"{config.distill.teacher_sha256}; restore the teacher, or start another run"
        )
    return replace(config, distill=replace(config.distill, teacher_sha256=digest))


def describe_model(model: GPTConfig) -> str:
    """Return the values that differ from the defaults: new fields do not change the text."""
    given, default = (
        dict(jax.tree.leaves_with_path(asdict(each), is_leaf=lambda node: node is None))
        for each in (model, GPTConfig())
    )
    return repr([
        (jax.tree_util.keystr(path), value)
        for path, value in given.items()
        if path not in default or value != default[path]
    ])  # fmt: skip


class Teacher:
    """The teacher of a run: its parameters are an input of the training step, not of the state.

    Parameters
    ----------
    config : Config
        The resolved configuration, with ``distill.teacher``.
    mesh : jax.sharding.Mesh
        The device mesh; parameters are sharded as those of the student.

    Attributes
    ----------
    model : GPTConfig
        The teacher's model, in the dtype of the student's computation.
    layout : Layout
        Its sharding on the mesh.
    abstract : nested dict of jax.ShapeDtypeStruct
        Shapes and shardings of the parameters, float32.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh) -> None:
        assert config.distill.teacher is not None
        self._name, self._mesh = config.distill.teacher, mesh
        found, _ = load_pretrained(self._name)
        self.model: GPTConfig = replace(
            found, dtype=config.model.dtype, float8=False, attention_implementation=None
        )
        rules = tjx_parallel.ShardingRules.of(config.mesh)
        self.layout = make_layout(self.model, mesh, rules, config.mesh)
        shapes = jax.eval_shape(lambda: tjx_nn.init(self.model, jax.random.key(0)))
        shardings = tjx_parallel.param_shardings(
            mesh, rules, tjx_nn.logical_axes(self.model), shapes
        )
        self.abstract: Any = jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings
        )

    @functools.cached_property
    def params(self) -> Any:
        """The parameters on the mesh."""
        _, params = load_pretrained(self._name)
        load_pretrained.cache_clear()  # the host does not need them any more
        return jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, self.abstract))

    def log_probs(self, batch: Batch) -> jax.Array:
        """Return the log-probabilities of the labels of rows, float32 [B, T] in nats."""
        inputs = {name: batch[name] for name in ("tokens", "labels")}
        found: jax.Array = self._log_probs(self.params, inputs)
        return found

    @functools.cached_property
    def _log_probs(self) -> Any:
        @jax.jit
        def log_probs(params: Any, inputs: Batch) -> jax.Array:
            network = tjx_nn.bind(self.model, params, layout=self.layout)
            return -network.losses(**inputs).tokens

        return log_probs

    def complete(
        self,
        step: int,  # noqa: ARG002  of the signature
        rows: HostBatch,
        state: TrainState,  # noqa: ARG002
    ) -> tuple[Batch, Mapping[str, float]]:
        """Return the rows on the mesh, with the teacher's parameters as "teacher"."""
        return {**tjx_parallel.shard_batch(self._mesh, rows), "teacher": self.params}, {}


def teacher_inputs(teacher: Teacher | None) -> dict[str, Any]:
    """Return shapes and shardings of the arrays that `Teacher.complete` adds to a batch."""
    return {} if teacher is None else {"teacher": teacher.abstract}
