"""verify, audit: checks that a cache is intact and agrees with its teacher."""

import json
import sys
from dataclasses import asdict, dataclass

import click

from teacher_cache.cli import report_text
from teacher_cache.examine.audit import AuditConfig, audit
from teacher_cache.format import CachePath
from teacher_cache.format.checking.findings import Verification
from teacher_cache.format.checking.repair import repair_cache
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.errors import repair_advice
from teacher_cache.terminal.commands import config_command, json_option
from teacher_cache.terminal.early_checks import check_cache, check_model
from teacher_cache.terminal.option import check_options, option
from teacher_cache.terminal.progress import Progress


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """`cache-teacher verify`."""

    cache: CachePath = option("Folder or URI of the cache, sealed or not.", is_argument=True)
    repair: bool = option(
        "Move damaged shards to CACHE/removed and remove the seal, to capture them again.",
        default=False,
    )

    def __post_init__(self) -> None:
        check_options(self)


@config_command("verify", VerifyConfig)
@json_option
def verify_command(config: VerifyConfig, as_json: bool) -> None:
    """Check every checksum, count and value of a cache.

    Lists everything that is wrong, and exits with 1 if anything is.
    With --repair, exits with 0 if everything wrong has been moved away.

    \b
    cache-teacher verify cache
    cache-teacher verify cache --repair
    """
    check_cache(config.cache)
    found = _verified(config.cache)
    done = repair_cache(config.cache, found) if config.repair and found.errors else None
    if as_json:
        figures = {name: value for name, value in asdict(found).items() if name != "header"}
        repaired = None if done is None else asdict(done)
        click.echo(json.dumps({"ok": not found.errors, **figures, "repair": repaired}))
    else:
        for finding in found.notes:
            click.echo(f"note: {report_text.finding_line(finding)}", err=True)
        for finding in found.errors:
            click.echo(report_text.finding_line(finding))
        click.echo(report_text.verified_line(found))
        if done is not None:
            for line in report_text.repair_lines(done, found.path):
                click.echo(line)
        elif found.errors:
            click.echo(repair_advice(found.path), err=True)
    if found.errors and done is None:
        sys.exit(1)


def _verified(cache: CachePath) -> Verification:
    with Progress("verified", unit="MB") as shown:
        return verify_cache(
            cache,
            lambda done, total: shown.set(-(-done // 1_000_000), total=-(-total // 1_000_000)),
        )


@config_command("audit", AuditConfig)
@json_option
def audit_command(config: AuditConfig, as_json: bool) -> None:
    """Score a sample again with another engine and compare.

    Exits with 1 if the distributions differ too much.

    \b
    cache-teacher audit cache --model Qwen/Qwen3-32B --num-traces 32
    """
    check_cache(config.cache)
    check_model(config.model, "--model")
    found = audit(config)
    if as_json:
        click.echo(json.dumps({"passed": found.passed, **asdict(found)}))
    else:
        for line in report_text.audit_lines(found):
            click.echo(line)
    if not found.passed:
        sys.exit(1)
