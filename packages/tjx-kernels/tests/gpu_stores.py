"""Replay where a Mosaic GPU kernel stores to device memory, without a GPU.

The interpreter cannot do this: it clips a copy at the end of each axis. On the GPU, a copy of a
contiguous slice from unswizzled shared memory is a bulk copy (`cp.async.bulk`), which Mosaic clips
at the end of the whole array: what lies past the end of a row is written to the next row. All other
copies are tensor copies (`cp.async.bulk.tensor`), which TMA clips at the end of each axis.

`replay` traces a function, and runs the integer arithmetic of its kernels for every thread block
and every warpgroup. It finds every `copy_smem_to_gmem` by itself, also to a reference among the
operands, which is an output too. Values that depend on data are unknown, and a store whose address
or condition is unknown raises an error.

Thread blocks run one after another, in the order of their index. A semaphore must then have exactly
the value that is waited for: a smaller one would be a hang, a larger one a violated order.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ref import AbstractRef


class Store(NamedTuple):
    """One executed `copy_smem_to_gmem`.

    Attributes
    ----------
    output
        Kernel name and index of the output; negative for a reference among the operands.
    shape
        Shape of the output.
    meant
        Flat index in the output of every copied number, -1 for numbers outside the output.
    written
        Flat index that the GPU writes for every copied number, -1 for numbers it does not write.
    reduction
        `reduction_op` of the copy: None, or for example "add".
    """

    output: tuple[str, int]
    shape: tuple[int, ...]
    meant: np.ndarray
    written: np.ndarray
    reduction: str | None


class Wait(NamedTuple):
    """One executed wait for a semaphore: the awaited value, and the signals before it."""

    kernel: str
    value: int
    signals: int


class _Unknown:
    """A value that depends on data, or a reference that is not an output."""


class _Output(NamedTuple):
    name: tuple[str, int]
    shape: tuple[int, ...]


_UNKNOWN = _Unknown()


def replay(function: Callable[..., Any], *specs: Any) -> tuple[list[Store], list[Wait]]:
    """Return all stores and waits of all Mosaic GPU kernels that a call of `function` starts."""
    kernels = list(_kernels(jax.make_jaxpr(function)(*specs).jaxpr))
    assert kernels, "the function has no Mosaic GPU kernel"
    stores: list[Store] = []
    waits: list[Wait] = []
    with jax.transfer_guard("allow"):  # single numbers, outside of jit
        for kernel in kernels:
            _run_kernel(kernel, stores, waits)
    return stores, waits


def _kernels(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            yield eqn
        else:
            for inner in _sub_jaxprs(eqn):
                yield from _kernels(inner)


def _sub_jaxprs(eqn: Any) -> Iterator[Any]:
    for param in eqn.params.values():
        for x in param if isinstance(param, (tuple, list)) else (param,):
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                yield inner


def _run_kernel(kernel: Any, stores: list[Store], waits: list[Wait]) -> None:
    [mesh], [jaxpr] = kernel.params["meshes"], kernel.params["jaxprs"]
    avals, name = kernel.params["out_avals"], kernel.params["name"]
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    first = len(jaxpr.invars) - len(avals)
    given = [isinstance(x.aval, AbstractRef) for x in kernel.invars] + [True] * len(avals)
    refs = [
        _Output((name, i - first), x.aval.shape) if is_output else _UNKNOWN
        for i, (x, is_output) in enumerate(zip(jaxpr.invars, given, strict=True))
    ]
    found = _Found(name, stores, waits, Counter(), {})
    axes = (*mesh.grid_names, mesh.thread_name)
    for place in itertools.product(*map(range, (*mesh.grid, mesh.num_threads))):
        _Thread(dict(zip(axes, place, strict=True)), found).run(jaxpr, (), refs)


class _Found(NamedTuple):
    """State of a kernel's replay, common to all warpgroups."""

    kernel: str
    stores: list[Store]
    waits: list[Wait]
    signals: Counter[tuple[int, ...]]
    computed: dict[Any, list[Any]]  # the same arithmetic recurs in most of the warpgroups


class _Thread:
    """Evaluate the integer arithmetic of a kernel's jaxpr for one warpgroup of one thread block."""

    def __init__(self, place: dict[Any, int], found: _Found) -> None:
        self.place, self.found, self.computed = place, found, found.computed

    def run(self, jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(x: Any) -> Any:
            return x.val if hasattr(x, "val") else env[x]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.step(eqn, [*map(read, eqn.invars)]), strict=True))
        return [read(x) for x in jaxpr.outvars]

    def step(self, eqn: Any, args: list[Any]) -> Any:
        name, params = eqn.primitive.name, eqn.params
        unknown = _unknown_like(eqn.outvars)
        if name == "axis_index":
            return [np.int32(self.place[params["axis_name"]])]
        if name == "copy_smem_to_gmem":
            self.found.stores.append(_store(eqn, args))
            return []
        if name in ("semaphore_wait", "semaphore_signal"):
            self.semaphore(name, *jax.tree.unflatten(params["args_tree"], args)[1:3])
            return []
        if name == "cond":
            return self.cond(params["branches"], args, unknown)
        if name == "while":
            return self.while_loop(params, args) if _has_store(eqn) else unknown
        if name == "scan":
            return self.scan(params, args) if _has_store(eqn) else unknown
        if name == "run_scoped":  # the operands are the constants of its jaxpr
            return self.run(params["jaxpr"], args, _unknown_like(params["jaxpr"].invars))
        if name in ("jit", "pjit"):
            return self.run(params["jaxpr"].jaxpr, params["jaxpr"].consts, args)
        assert not _has_store(eqn), f"{name} is not replayed"
        if not eqn.outvars or eqn.effects or any(isinstance(x, _Unknown | _Output) for x in args):
            return unknown
        if any(x.aval.shape or x.aval.dtype.kind == "f" for x in eqn.outvars):  # no address
            return unknown
        key = (eqn, *map(int, args))
        if key not in self.computed:
            found = eqn.primitive.bind(*args, **params)
            found = found if eqn.primitive.multiple_results else [found]
            self.computed[key] = [np.asarray(x) for x in found]
        return self.computed[key]

    def semaphore(self, name: str, transforms: Any, value: Any) -> None:
        [indexer] = transforms
        assert not any(isinstance(x, _Unknown) for x in (value, *indexer.indices))
        index = tuple(map(int, indexer.indices))
        if name == "semaphore_signal":
            self.found.signals[index] += int(value)
        else:
            self.found.waits.append(Wait(self.found.kernel, int(value), self.found.signals[index]))

    def scan(self, params: Any, args: list[Any]) -> Any:
        jaxpr = params["jaxpr"]
        split = len(args) - len(jaxpr.out_avals)
        consts, carry = args[:split], args[split:]
        assert len(jaxpr.in_avals) == len(args), "a loop over arrays is not replayed"
        for _ in range(params["length"]):
            carry = self.run(jaxpr.jaxpr, jaxpr.consts, [*consts, *carry])
        return carry

    def cond(self, branches: Any, args: list[Any], unknown: list[Any]) -> Any:
        index, *operands = args
        if isinstance(index, _Unknown):
            assert not any(_any_store(x.jaxpr) for x in branches), "a store depends on data"
            return unknown
        branch = branches[int(index)]
        return self.run(branch.jaxpr, branch.consts, operands)

    def while_loop(self, params: Any, args: list[Any]) -> Any:
        first, second = params["cond_nconsts"], params["body_nconsts"]
        for_cond, for_body = args[:first], args[first : first + second]
        carry = args[first + second :]
        cond, body = params["cond_jaxpr"], params["body_jaxpr"]
        while True:
            [goes_on] = self.run(cond.jaxpr, cond.consts, [*for_cond, *carry])
            assert not isinstance(goes_on, _Unknown), "a store's loop depends on data"
            if not goes_on:
                return carry
            carry = self.run(body.jaxpr, body.consts, [*for_body, *carry])


def _unknown_like(variables: Any) -> list[Any]:
    return [_UNKNOWN] * len(variables)


def _has_store(eqn: Any) -> bool:
    return any(map(_any_store, _sub_jaxprs(eqn)))


@cache
def _any_store(jaxpr: Any) -> bool:
    names = ("copy_smem_to_gmem", "semaphore_wait", "semaphore_signal")
    return any(x.primitive.name in names or _has_store(x) for x in jaxpr.eqns)


def _store(eqn: Any, args: list[Any]) -> Store:
    params = eqn.params
    assert not params["has_user_predicate"], "a predicate is not replayed"
    _, output, *leaves = args
    assert isinstance(output, _Output), "a store to something that is not an output"
    split = params["src_transforms_treedef"].num_leaves
    of_source = params["src_transforms_treedef"].unflatten(leaves[:split])
    [indexer] = params["dst_transforms_treedef"].unflatten(leaves[split:])
    starts, sizes = [], []
    for index in indexer.indices:
        assert not isinstance(index, _Unknown), "a store's address depends on data"
        starts.append(int(getattr(index, "start", index)))
        sizes.append(getattr(index, "size", 1))
    swizzled = any("Unswizzle" in type(x).__name__ for x in of_source)
    offsets = np.indices(sizes).reshape(len(sizes), -1)
    places, shape = offsets + np.array(starts)[:, None], output.shape
    inside = np.all((places >= 0) & (places < np.array(shape)[:, None]), axis=0)
    strides = np.array([np.prod(shape[axis + 1 :], dtype=int) for axis in range(len(shape))])
    flat = strides @ places
    meant = np.where(inside, flat, -1)
    written = np.where(flat < np.prod(shape), flat, -1)
    bulk = not swizzled and params["reduction_op"] is None and _contiguous(sizes, strides)
    return Store(output.name, shape, meant, written if bulk else meant, params["reduction_op"])


def _contiguous(sizes: list[int], strides: np.ndarray) -> bool:
    """Repeat the rule by which Mosaic GPU chooses a bulk copy (`check_contiguous_slice`)."""
    length = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != length:
            return False
        length *= size
    return True
