"""What a drill tells people: the ledger as a sum, what is wrong by name, and a timeline."""

from collections import Counter
from pathlib import Path

import pytest

from codeyard.cli.drill.audit import LOST, Finding, Ledger
from codeyard.cli.drill.faults import Met
from codeyard.cli.drill.plan import FaultKind
from codeyard.cli.drill.run import Report
from codeyard.cli.drill.view import as_json, plot, print_report
from codeyard.cli.drill.watch import Moment


def a_report(*findings: Finding, recovery_s: float | None = 1.25) -> Report:
    ledger = Ledger(
        accepted=5 + len(findings), states=Counter(succeeded=4, failed=1), findings=list(findings), tokens=100
    )
    met = [
        Met(FaultKind.KILL_WORKER, "worker 1", 2.0, 1.5, recovery_s),
        Met(FaultKind.CUT_STORE, "9 links", 5, 0.5, 0.4),
    ]
    timeline = [Moment(float(second), second, second // 2) for second in range(10)]
    return Report(7, 5, "redis 7.0.15, amqp", ledger, [0.2], met, timeline, 10.0, 1.0)


def test_a_good_drill_says_so_in_the_sum_that_everyone_can_check(capsys: pytest.CaptureFixture[str]) -> None:
    """accepted = succeeded + failed + expired + cancelled, line by line."""
    print_report(a_report())

    told = " ".join(capsys.readouterr().out.split())
    assert "5 accepted = 4 succeeded + 1 failed + 0 expired + 0 cancelled 0 lost 0 duplicated 0 wrong" in told
    assert "kill_worker 1 1.5 s 1.2 s 1.2 s" in told
    assert told.endswith("nothing lost, nothing twice")
    assert as_json(a_report())["good"] is True


def test_a_lost_job_is_named_and_the_drill_is_not_good(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads it must be able to look for the job."""
    report = a_report(Finding(LOST, "job-17", "no record"))

    print_report(report)

    told = capsys.readouterr().out
    assert "lost: job-17 no record" in told
    assert "NOT GOOD" in told
    assert as_json(report)["ledger"]["lost"] == 1
    assert as_json(report)["good"] is False


def test_a_fleet_that_did_not_come_back_is_not_good_either(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing lost, and nobody served: a drill must not pass that."""
    report = a_report(recovery_s=None)

    print_report(report)

    assert "not recovered: kill_worker of worker 1" in capsys.readouterr().out
    assert not report.good


def test_the_timeline_is_drawn_also_of_a_drill_without_faults(tmp_path: Path) -> None:
    """A picture for the report."""
    pytest.importorskip("matplotlib")
    calm = a_report()
    calm.met = []

    for number, report in enumerate((a_report(), a_report(recovery_s=None), calm)):
        plot(report, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
