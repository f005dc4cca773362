"""Lint, fix and format with a current ruff.

The backend of Pants 2.17 calls `ruff FILES`, which a current ruff rejects, and does not support
`ruff format`. Its subsystem (options, lock file, configuration) is used here unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pants.backend.python.lint.ruff import subsystem as ruff_subsystem
from pants.backend.python.lint.ruff.subsystem import Ruff, RuffFieldSet
from pants.backend.python.util_rules import pex
from pants.backend.python.util_rules.pex import PexRequest, VenvPex, VenvPexProcess
from pants.core.goals.fix import FixResult, FixTargetsRequest
from pants.core.goals.fmt import FmtResult, FmtTargetsRequest
from pants.core.goals.lint import LintResult, LintTargetsRequest
from pants.core.util_rules.config_files import ConfigFiles, ConfigFilesRequest
from pants.core.util_rules.partitions import PartitionerType
from pants.core.util_rules.source_files import SourceFiles, SourceFilesRequest
from pants.engine.fs import Digest, MergeDigests
from pants.engine.internals.native_engine import Snapshot
from pants.engine.process import FallibleProcessResult
from pants.engine.rules import Get, MultiGet, collect_rules, rule
from pants.util.logging import LogLevel
from pants.util.meta import classproperty
from pants.util.strutil import pluralize


class RuffFixRequest(FixTargetsRequest):
    field_set_type = RuffFieldSet
    tool_subsystem = Ruff
    partitioner_type = PartitionerType.DEFAULT_SINGLE_PARTITION

    @classproperty
    def tool_name(cls) -> str:
        return "ruff check --fix"


class RuffFormatRequest(FmtTargetsRequest):
    field_set_type = RuffFieldSet
    tool_subsystem = Ruff
    partitioner_type = PartitionerType.DEFAULT_SINGLE_PARTITION

    @classproperty
    def tool_name(cls) -> str:
        return "ruff format"


class RuffLintRequest(LintTargetsRequest):
    field_set_type = RuffFieldSet
    tool_subsystem = Ruff
    partitioner_type = PartitionerType.DEFAULT_SINGLE_PARTITION

    @classproperty
    def tool_name(cls) -> str:
        return "ruff check"


@dataclass(frozen=True)
class RuffRun:
    """One call of ruff over a snapshot of files."""

    command: tuple[str, ...]
    snapshot: Snapshot


@rule(level=LogLevel.DEBUG)
async def run_ruff(run: RuffRun, ruff: Ruff) -> FallibleProcessResult:
    ruff_pex, config_files = await MultiGet(
        Get(VenvPex, PexRequest, ruff.to_pex_request()),
        Get(ConfigFiles, ConfigFilesRequest, ruff.config_request(run.snapshot.dirs)),
    )
    digest = await Get(Digest, MergeDigests((run.snapshot.digest, config_files.snapshot.digest)))
    config = (f"--config={ruff.config}",) if ruff.config else ()
    process = VenvPexProcess(
        ruff_pex,
        argv=(*run.command, "--no-cache", *config, *ruff.args, *run.snapshot.files),
        input_digest=digest,
        output_files=run.snapshot.files,
        description=f"Run ruff {run.command[0]} on {pluralize(len(run.snapshot.files), 'file')}.",
        level=LogLevel.DEBUG,
    )
    return await Get(FallibleProcessResult, VenvPexProcess, process)


@rule(desc="Fix with ruff", level=LogLevel.DEBUG)
async def ruff_fix(request: RuffFixRequest.Batch) -> FixResult:
    # `lint` reports findings that ruff cannot fix.
    run = RuffRun(("check", "--fix", "--exit-zero"), request.snapshot)
    result = await Get(FallibleProcessResult, RuffRun, run)
    return await FixResult.create(request, result, strip_chroot_path=True)


@rule(desc="Format with ruff", level=LogLevel.DEBUG)
async def ruff_format(request: RuffFormatRequest.Batch) -> FmtResult:
    # Leave a file that does not parse unchanged; `lint` reports it.
    result = await Get(FallibleProcessResult, RuffRun, RuffRun(("format",), request.snapshot))
    return await FmtResult.create(request, result, strip_chroot_path=True)


@rule(desc="Lint with ruff", level=LogLevel.DEBUG)
async def ruff_lint(request: RuffLintRequest.Batch[RuffFieldSet, Any]) -> LintResult:
    sources = await Get(
        SourceFiles, SourceFilesRequest(field_set.source for field_set in request.elements)
    )
    result = await Get(FallibleProcessResult, RuffRun, RuffRun(("check",), sources.snapshot))
    return LintResult.create(request, result, strip_chroot_path=True)


def rules():
    return (
        *collect_rules(),
        *ruff_subsystem.rules(),
        *RuffFixRequest.rules(),
        *RuffFormatRequest.rules(),
        *RuffLintRequest.rules(),
        *pex.rules(),
    )
