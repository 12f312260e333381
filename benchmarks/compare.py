"""Whether two reports of one benchmark give the same ratios: the guard against a variant that got slower.

python -m benchmarks.compare OLD.json NEW.json exits with 1 where a variant got slower beside its baseline. Times of
two runs cannot be compared, but the ratios of each can: what the machine did met both variants of a ratio. So a ratio
guards the variant and not the baseline; where two or more variants got faster beside the same baseline, and none did
not, the baseline is taken to have got slower. Best is a baseline that does not change, such as eager:fp32.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.core.report import EXIT_RED, Comparison, Report, case_text, read_report
from benchmarks.core.stats import Ratio
from benchmarks.core.terminal import print_table
from engine.cli.command import run_command
from engine.errors import RequestError

MOST_LOAD = 0.5
"""Of what two runs' loads may differ by, a thread: two runs on a machine without others differ by less."""


class Change(StrEnum):
    """Of a ratio, from the old report to the new."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "slower"


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison in both reports."""

    old: Comparison
    new: Comparison

    @property
    def value(self) -> float:
        """New ratio / old ratio, above 1 where the variant got slower."""
        return self.new.ratio.value / self.old.ratio.value

    @property
    def interval(self) -> tuple[float, float]:
        """In which value lies: the runs are independent, so in logarithms their errors add as squares, on each side."""
        old, new, middle = self.old.ratio, self.new.ratio, math.log(self.value)
        low = math.hypot(_below(new), _above(old))
        high = math.hypot(_above(new), _below(old))
        return math.exp(middle - low), math.exp(middle + high)

    @property
    def change(self) -> Change:
        """The same where the interval holds 1."""
        low, high = self.interval
        if low <= 1 <= high:
            return Change.SAME
        return Change.SLOWER if low > 1 else Change.FASTER


def _below(ratio: Ratio) -> float:
    return math.log(ratio.value / ratio.low)


def _above(ratio: Ratio) -> float:
    return math.log(ratio.high / ratio.value)


def match(old: Report, new: Report) -> list[Pair]:
    """Comparisons that both have, in the new one's order; raises RequestError where the reports do not belong together.

    What they measured must be the same: benchmark and subject.
    """
    if old.benchmark != new.benchmark:
        raise RequestError(f"the reports are of {old.benchmark} and {new.benchmark}; pass two of one benchmark")
    different = [name for name in {**old.subject, **new.subject} if old.subject.get(name) != new.subject.get(name)]
    if different:
        values = ", ".join(f"{name} {old.subject.get(name)} and {new.subject.get(name)}" for name in different)
        raise RequestError(f"the reports measured different subjects ({values}); pass two of one network")
    before = {comparison.key: comparison for comparison in old.comparisons}
    pairs = [Pair(before[c.key], c) for c in new.comparisons if c.key in before]
    if not pairs:
        raise RequestError("the reports have no comparison in common; run both with the same variants and batches")
    return pairs


def slower_baselines(pairs: Sequence[Pair]) -> list[str]:
    """Baselines, with their case, beside which two or more variants got faster and none did not."""
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((case_text(pair.new.case), pair.new.baseline), []).append(pair)
    return [
        f"{baseline} ({case})"
        for (case, baseline), group in groups.items()
        if len(group) > 1 and all(pair.change is Change.FASTER for pair in group)
    ]


def only_in(one: Report, other: Report) -> list[str]:
    """Comparisons that the other report lacks."""
    keys = {comparison.key for comparison in other.comparisons}
    return [f"{c.variant} / {c.baseline} ({case_text(c.case)})" for c in one.comparisons if c.key not in keys]


def environment_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs of processor, GPU, threads, load and versions, any of which can change a ratio.

    Libraries suffer differently where others take their cores: what waits at every operator suffers most.
    """
    found = []
    for name in ("cpu", "gpu"):
        before, after = (None if block[name] is None else _model(block[name]) for block in (old, new))
        found += [f"{name}: {before} and {after}"] if before != after else []
    if old["threads"] != new["threads"]:
        found.append(f"threads: {old['threads']} and {new['threads']}")
    loads = [block["load_average"] for block in (old, new)]
    if all(loads) and abs(loads[0][0] - loads[1][0]) > MOST_LOAD * new["threads"]:
        found.append(f"load over a minute: {loads[0][0]} and {loads[1][0]}")
    versions = {**old["versions"], **new["versions"]}
    for name in versions:
        before, after = old["versions"].get(name), new["versions"].get(name)
        found += [f"{name}: {before} and {after}"] if before != after else []
    return found


def _model(block: Mapping[str, Any]) -> Any:
    return block.get("model", block.get("name"))


def print_pairs(pairs: Sequence[Pair]) -> None:
    """A table of both ratios and what came of them."""
    styles = {Change.SAME: "dim", Change.FASTER: "green", Change.SLOWER: "bold red"}
    rows = []
    for pair in pairs:
        low, high = pair.interval
        texts = (
            case_text(pair.new.case),
            f"{pair.new.variant} / {pair.new.baseline}",
            f"{pair.old.ratio.value:.3f}",
            f"{pair.new.ratio.value:.3f}",
            f"{pair.value:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(pair.change),
        )
        rows.append((texts, styles[pair.change]))
    print_table("ratios of two runs", ("case", "ratio of", "old", "new", "new / old", "interval", "variant is"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 where something got slower, 2 for reports that cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare two reports' ratios.")
    parser.add_argument("old", type=Path, help="report (JSON) of a benchmark")
    parser.add_argument("new", type=Path, help="a later one of the same benchmark and subject")
    is_slower = False

    def action(args: argparse.Namespace) -> None:
        nonlocal is_slower
        old, new = read_report(args.old), read_report(args.new)
        pairs = match(old, new)
        print_pairs(pairs)
        for text, change in (("slower", Change.SLOWER), ("faster", Change.FASTER)):
            for pair in pairs:
                if pair.change is change:
                    print(f"{text}: {pair.new.variant} beside {pair.new.baseline} ({case_text(pair.new.case)})")
        baselines = slower_baselines(pairs)
        for name in baselines:
            print(f"slower: {name}, for every variant got faster beside it")
        for where, names in (("old", only_in(old, new)), ("new", only_in(new, old))):
            for name in names:
                print(f"only in the {where} report: {name}")
        for text in environment_changes(old.environment, new.environment):
            print(f"not measured alike: {text}")
        same = sum(pair.change is Change.SAME for pair in pairs)
        print(f"{same} of {len(pairs)} ratios are the same")
        is_slower = bool(baselines) or any(pair.change is Change.SLOWER for pair in pairs)

    return run_command(action, parser.parse_args(argv)) or (EXIT_RED if is_slower else 0)


if __name__ == "__main__":
    sys.exit(main())
