"""The page of a comparison: its numbers are the document's, names stay text, and nothing leaves it."""

from __future__ import annotations

import json
import re
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardwright.compare.run import show
from shardwright.errors import RunError
from shardwright.report.comparison import byte_columns, derived_columns, print_comparison, step_columns
from shardwright.report.files import write_report
from tests.docs.comparison_document import HOSTILE, LEDGER, make_comparison

Made = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("runs") / "compare-tiny"
    document = make_comparison(directory)
    assert write_report([directory]) == [directory / "report.html"]
    return directory / "report.html", document


def charts_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', path.read_text())
    assert found
    return {chart["name"]: chart["figures"][0] for chart in json.loads(found[1])}


def own_text(path: Path) -> str:
    """The page without the text of Plotly's script."""
    parts = re.split(r"(<script>.*?</script>)", path.read_text(), flags=re.DOTALL)
    return "".join(part for part in parts if "plotly.js v" not in part)


def table_of(path: Path) -> list[list[str]]:
    """The rows of the table of all numbers, as their text."""
    found = re.search(r'<table class="parts">(.*?)</table>', path.read_text())
    assert found
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", found[1])]
    return [[unescape(re.sub(r"</?span>", "", cell)) for cell in row] for row in rows]


def test_times_and_bubbles_are_those_of_the_rows(made: Made) -> None:
    charts, rows = charts_of(made[0]), made[1]["rows"][:3]
    (times,) = charts["times"]["data"]
    assert times["x"] == [row["seconds"] * 1e3 for row in rows]
    assert charts["times"]["layout"]["yaxis"]["ticktext"] == [f"{row['name']}  " for row in rows]
    shares = {trace["name"]: trace["x"] for trace in charts["bubble"]["data"]}
    assert shares == {"measured": [pytest.approx(41)], "planned": [pytest.approx(29)]}


@pytest.mark.parametrize(("origin", "shift"), [("measured", -0.2), ("estimated", 0.2)])
def test_bytes_are_those_of_the_rows(made: Made, origin: str, shift: float) -> None:
    charts, rows = charts_of(made[0]), made[1]["rows"][:3]

    def shown(chart: str) -> dict[str, list[int]]:
        data = [trace for trace in charts[chart]["data"] if trace["y"][0] == shift]
        assert all(trace["y"] == [place + shift for place in range(3)] for trace in data)
        return {trace["name"]: [size for _, size in trace["customdata"]] for trace in data}

    memory = {part: [row["memory"][origin][part] for row in rows] for part in (*LEDGER, "peak")}
    assert shown("memory") == memory
    groups = [row["communication"]["by_group"][origin] for row in rows]
    sent = {part: [sizes.get(part, 0) for sizes in groups] for part in ("gradients", "pipeline", "other")}
    assert shown("sent") == sent | {"sent": [sum(sizes.values()) for sizes in groups]}


def test_whether_bytes_are_as_estimated_is_said_once(made: Made, tmp_path: Path) -> None:
    assert dict(charts_of(made[0])["sent"]["numbers"])["measured and estimated"].startswith("equal to the byte")
    make_comparison(tmp_path / "off", exact=False)
    page = write_report([tmp_path / "off"])[0]
    says = dict(charts_of(page)["sent"]["numbers"])["measured and estimated"]
    assert says == "they differ in data parallelism; pipeline, 1f1b"
    assert page.read_text().count('<td class="wrong"><span>NO</span>') == 2


def test_largest_models_are_those_planned(made: Made) -> None:
    figure, derived = charts_of(made[0])["largest"], made[1]["derived"]
    assert figure["layout"]["xaxis"]["type"] == "log"
    for trace in figure["data"]:
        world = trace["name"].removesuffix(" ranks")
        models = [row["scalability"].get(world) for row in derived]
        models = [model for model in models if isinstance(model, dict)]
        assert trace["x"] == [model["parameters"] for model in models]
        efficiencies = [f"{model['efficiency']:.0%}".replace("%", " %") for model in models]
        assert [said[-1] for said in trace["customdata"]] == efficiencies


def test_the_table_is_the_terminal_s(made: Made) -> None:
    """All of its columns, reasons in the place of what cannot be, and the same cells."""
    rows, document = table_of(made[0]), made[1]
    printed = StringIO()
    print_comparison(document, Console(file=printed, width=200))
    reason = document["rows"][3]["reason"]
    assert reason in printed.getvalue()
    parts = (byte_columns(document["rows"]), step_columns(document["rows"]), derived_columns(document["derived"]))
    left = iter(rows)
    for part, cells in enumerate(parts):
        assert len(next(left)) == 1  # its title
        for row in cells:
            shown = next(left)
            if row[0] == "3D" and part < 2:
                assert shown == ["3D", f"not measured: {reason if not part else 'see above'}"]
            else:
                assert shown[: len(row)] == list(row)
                assert all(cell in printed.getvalue() for cell in row)
    assert list(left) == []


def test_the_head_says_that_ranks_share_cores(made: Made) -> None:
    text = own_text(made[0])
    assert "4 ranks on cpu, 2 cores for them: times say how much work there is" in text
    assert "2026-01-02 10:01 to 10:03" in text and "3 measured, 1 not" in text
    assert "memory efficiency</th><td>What one device takes" in text


def test_names_stay_text_and_nothing_is_loaded(made: Made) -> None:
    text = own_text(made[0])
    assert "<img" not in text and HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in text
    assert "http://" not in text and "https://" not in text
    assert not re.search(r"<(link|img|iframe|script[^>]* src)|@import|url\(", text)
    assert "default-src 'none'" in text


def test_a_comparison_that_goes_on_has_what_is_there(tmp_path: Path) -> None:
    make_comparison(tmp_path / "c", complete=False)
    page = write_report([tmp_path / "c"], tmp_path / "here.html")[0]
    assert page == tmp_path / "here.html" and "not complete" in page.read_text()
    assert list(charts_of(page)) == ["times", "bubble", "memory", "sent"]


def test_what_is_damaged_or_not_alone_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a comparison, which has a page of its own"):
        write_report([made[0].parent, tmp_path])
    (tmp_path / "comparison.json").write_text('{"rows": [{}]}')
    with pytest.raises(RunError, match=r"comparison\.json: damaged, or not written by `compare`: KeyError"):
        write_report([tmp_path])


@pytest.mark.parametrize("as_json", [False, True])
def test_compare_prints_where_its_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    document = make_comparison(tmp_path / "c")
    assert show(document, as_json) == 0
    told = capsys.readouterr()
    assert f"page: {tmp_path / 'c' / 'report.html'}\n" in (told.err if as_json else told.out)
    assert not as_json or json.loads(told.out) == document
    (tmp_path / "c" / "report.html").unlink()
    (tmp_path / "c" / "report.html").mkdir()
    assert show(document, as_json) == 0  # the numbers are there without it
    told = capsys.readouterr()
    assert "no page: " in (told.err if as_json else told.out)
