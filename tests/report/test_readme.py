"""The README's table comes from the report and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from commissure.core.errors import InputError
from commissure.report import readme
from commissure.report.results import Report


def test_only_the_part_between_the_markers_changes(report: Report, tmp_path: Path) -> None:
    source, target = report.write(tmp_path / "full.json"), tmp_path / "README.md"
    target.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nEnd.\n", "utf-8")
    assert readme.main([str(source), str(target), str(tmp_path / "papers.md")]) == 0
    first = target.read_text("utf-8")
    assert first.startswith(f"# Title\n\n{readme.BEGIN}\n| claim |")
    assert first.endswith(f"\n{readme.END}\n\nEnd.\n")
    assert "old" not in first
    assert "13.1 [12.5, 13.9] ×" in first
    assert all(line.count(" | ") == 5 for line in first.splitlines() if line.startswith("| `"))
    readme.main([str(source), str(target), str(tmp_path / "papers.md")])
    assert target.read_text("utf-8") == first


def test_the_index_lists_every_claim_under_its_paper(report: Report) -> None:
    page = readme.papers(report)
    for entry in report.entries:
        section = page.split(f"## {entry.paper}\n")[1].split("\n## ")[0]
        assert f"| `{entry.id}` |" in section
        assert entry.verdict in section


def test_missing_markers(report: Report) -> None:
    with pytest.raises(InputError, match="claims:begin"):
        readme.update("# Title", report)
    with pytest.raises(InputError, match="claims:end"):
        readme.update(f"# Title {readme.BEGIN}", report)


def test_the_readme_of_this_checkout_shows_its_report() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text("utf-8")
    assert text.count(readme.BEGIN) == text.count(readme.END) == 1
    published = root / "reports" / "full.json"
    if published.exists():
        shown = readme.update(text, Report.from_json(published.read_text("utf-8")))
        assert shown == text, "run: python -m commissure.report.readme"
