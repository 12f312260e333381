"""The pages and the README's table say what the reports say; the suite goes on past a part that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import page, suite
from benchmarks.core.environment import environment
from benchmarks.core.report import Check, Comparison, Missing, Report, Row
from benchmarks.core.stats import Ratio

ROOT = Path(__file__).parents[2]
OURS = "UNet-RT (native bf16)"


def peers_report(checks: tuple[Check, ...] = ()) -> Report:
    def row(name: str, precision: str, guided: bool, speed: float) -> Row:
        case = {"contender": name, "precision": precision, "steps": 10, "guided": guided, "batch": 4}
        return Row(case, {"images_per_s": speed})

    case = {"steps": 10, "guided": False, "batch": 4}
    return Report(
        benchmark="peers",
        command="python -m benchmarks.peers digits.engine --short",
        environment=environment(2),
        subject={"name": "digits", "parameters": 2_400_000},
        settings={"steps": 10, "batch": 4},
        rows=[
            row(OURS, "bf16", False, 4.0),
            row("UNet-RT (native fp32)", "fp32", False, 3.0),
            row("ONNX Runtime", "fp32", False, 1.0),
            row("diffusers", "fp32", False, 0.5),
            row(OURS, "bf16", True, 2.0),
            row("ONNX Runtime", "fp32", True, 0.25),
        ],
        comparisons=[
            Comparison(case, "UNet-RT (native fp32)", OURS, Ratio(1.3, 1.2, 1.4, 0.99, 12)),
            Comparison(case, "ONNX Runtime", OURS, Ratio(4.0, 3.9, 4.12, 0.99, 12)),
            Comparison(case, "diffusers", OURS, Ratio(8.0, 7.5, 8.5, 0.99, 12)),
            Comparison(case | {"guided": True}, "ONNX Runtime", OURS, Ratio(8.0, 7.9, 8.12, 0.99, 12)),
        ],
        checks=checks,
        missing=[Missing("trt", "no\nGPU")],
    )


def test_the_pages_and_the_block_come_from_the_files(tmp_path):
    reports = tmp_path / "reports"
    reports.mkdir()
    peers_report((Check("same images", False, 30.0, 40.0, "look at them"),)).save(reports / "peers.json")
    (reports / page.NOTES).write_text("## Why\n\nIt was busy.\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert page.main([str(reports), "--page", str(tmp_path / "page.md"), "--readme", str(readme)]) == 0
    first = (tmp_path / "page.md").read_text()
    table = [
        "|  | precision | images/s | time / ours | guided: images/s | time / ours |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| **{OURS}** | bf16 | **4** | 1 | **2** | 1 |",
        "| ONNX Runtime | fp32 | 1 | 4.00 (3.90 to 4.12) | 0.25 | 8.00 (7.90 to 8.12) |",
        "| diffusers | fp32 | 0.5 | 8.00 (7.50 to 8.50) | - | - |",
    ]
    start = ["# Benchmarks", "", "![Images/s of this engine and of what one would use instead](reports/peers.png)", ""]
    assert first.splitlines()[: len(start) + len(table) + 1] == [*start, *table, ""]
    assert "(reports/tables.md#peers-digits)" in first
    assert first.endswith("\n\n## Why\n\nIt was busy.\n")
    assert max(line.count("|") for line in first.splitlines()) == 7
    tables = (reports / "tables.md").read_text()
    assert "\n## peers: digits\n" in tables
    assert f"| {OURS} | bf16 | 10 | False | 4 | 4 |" in tables
    case = "steps=10 guided=False batch=4"
    assert f"| {case} | ONNX Runtime | {OURS} | 4.000 | 3.900 to 4.120 | slower |" in tables
    assert "- not measured: trt: no GPU" in tables
    assert "Checks: 0 of 1 passed." in tables
    assert "- **FAILED: same images (30, limit 40); look at them**" in tables
    assert "![peers](peers.png)" in tables
    block = readme.read_text()
    assert block.startswith(f"before\n{page.BEGIN}\n" + "\n".join(table))
    assert block.endswith("after\n")
    assert "The digits model (2.4 M parameters), 10 DDIM steps, batch 4" in block
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
    assert not (tmp_path / "p.md").exists()


def test_the_shipped_pages_say_what_the_shipped_reports_say():
    folder = ROOT / "docs" / "benchmarks"
    reports = page.read_reports(folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == page.replace_block(readme, page.headline(reports["peers"]), ROOT / "README.md")
    wanted = page.overview(reports, "benchmarks", page.read_notes(folder))
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == wanted
    assert (folder / page.TABLES).read_text(encoding="utf-8") == page.tables(reports)
    assert all((folder / f"{name}.png").is_file() for name in reports)


def test_no_accuracy_of_few_images_is_shown():
    reports = page.read_reports(ROOT / "docs" / "benchmarks").values()
    rows = [row for report in reports for row in report.rows if "accuracy" in row.metrics]
    assert rows
    assert all(int(row.case["images"] or 0) >= 50 for row in rows)


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


def test_every_part_of_the_suite_is_a_command_here():
    for part in suite.parts(Path("work")):
        name = part.module.replace(".", "/")
        assert any((ROOT / "benchmarks" / path).is_file() for path in (f"{name}.py", f"{name}/__main__.py"))
