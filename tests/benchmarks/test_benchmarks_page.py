"""The page and the README's table say what the reports say; the suite goes on past a part that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import page, suite
from benchmarks.environment import environment
from benchmarks.report import Check, Comparison, Missing, Report, Row
from benchmarks.stats import Ratio

ROOT = Path(__file__).parents[2]


def peers_report(checks: tuple[Check, ...] = ()) -> Report:
    case = {"setting": "ddim50", "guided": True, "batch": 4}
    return Report(
        benchmark="peers",
        command="python -m benchmarks.peers digits.engine --short",
        environment=environment(2),
        subject={"name": "digits"},
        settings={},
        rows=[
            Row({"contender": "UNet-RT", **case}, {"images_per_s": 4.0}),
            Row({"contender": "torch eager", **case}, {"images_per_s": 1.0}),
        ],
        comparisons=[Comparison(case, "torch eager", "UNet-RT", Ratio(4.0, 3.9, 4.12, 0.99, 25))],
        checks=checks,
        missing=[Missing("trt", "no\nGPU")],
    )


def test_the_page_and_the_block_come_from_the_files(tmp_path, capsys):
    (tmp_path / "reports").mkdir()
    peers_report((Check("same images", False, 30.0, 40.0, "look at them"),)).save(tmp_path / "reports" / "peers.json")
    (tmp_path / "reports" / page.NOTES).write_text("## Why\n\nIt was busy.\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    argv = [str(tmp_path / "reports"), "--page", str(tmp_path / "page.md"), "--readme", str(readme)]
    assert page.main(argv) == 0
    text = (tmp_path / "page.md").read_text()
    assert text.endswith("\n\n## Why\n\nIt was busy.\n")
    assert "| torch eager | ddim50 | True | 4 | 1 |" in text
    assert "| setting ddim50 guided True batch 4 | torch eager | UNet-RT | 4.000 | 3.900 to 4.120 | slower |" in text
    assert "- not measured: trt: no GPU" in text
    assert "Checks: 0 of 1 passed." in text
    assert "- **FAILED: same images (30, limit 40); look at them**" in text
    assert "![peers](reports/peers.png)" in text
    block = readme.read_text()
    assert block.startswith("before\n")
    assert block.endswith("after\n")
    assert "| torch eager | 1 (4.00 times our time: 3.90 to 4.12) |" in block
    assert "| UNet-RT | **4** |" in block
    assert "`python -m benchmarks.peers digits.engine --short`" in block
    assert "old" not in block


def test_bad_folders_and_files_exit_with_2(tmp_path, capsys):
    assert page.main([str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert page.main([str(tmp_path)]) == 2
    assert "holds no report" in capsys.readouterr().err
    peers_report().save(tmp_path / "peers.json")
    (tmp_path / "README.md").write_text("nothing marked")
    argv = [str(tmp_path), "--page", str(tmp_path / "p.md"), "--readme", str(tmp_path / "README.md")]
    assert page.main(argv) == 2
    assert "has no lines" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "nothing marked"


def test_the_readme_says_what_the_shipped_reports_say():
    reports = page.read_reports(ROOT / "docs" / "benchmarks")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == page.replace_block(text, page.headline(reports["peers"]), ROOT / "README.md")
    notes = page.read_notes(ROOT / "docs" / "benchmarks")
    assert "falls short" in notes
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page.page(reports, "benchmarks", notes)


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Parts that are small programs; the report of a passed one is empty JSON."""

    def part(name: str, code: str) -> suite.Part:
        monkeypatch.setattr(suite, "_command", lambda part: [sys.executable, "-c", part.arguments[0]])
        return suite.Part(name, "none", (code,), 60.0)

    return part


def test_a_part_that_fails_leaves_the_others_alone(scripted, tmp_path):
    def writes(code: int) -> str:
        return f"import sys; open(sys.argv[2] + '/' + sys.argv[4] + '.json', 'w'); sys.exit({code})"

    (tmp_path / "gone.json").write_text(json.dumps({}))
    chosen = [
        scripted("good", writes(0)),
        scripted("red", writes(1)),
        scripted("gone", "raise SystemExit(0)"),
        scripted("bad", writes(2)),
    ]
    outcomes = suite.run_all(chosen, tmp_path, 60.0)
    assert [o.status for o in outcomes] == ["passed", "red", "failed", "failed"]
    assert not (tmp_path / "gone.json").exists()
    late = suite.run_all([scripted("late", "import time; time.sleep(60)")], tmp_path, 0.1)
    assert late[0].status == "out of time"
