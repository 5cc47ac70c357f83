"""The report of a run: what it shows is what the records hold, and nothing leaves the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shardwright.cli.main import app
from shardwright.errors import RunError
from shardwright.plan.pipeline import computing_schedule_of, totals_of
from shardwright.report.files import write_report
from shardwright.report.page.pipeline import pipelines
from shardwright.report.page.run import read_run
from tests.docs.report_run import STEP, make_run

STEPS = 60
LAYOUT = ("parallel.dp=2", "parallel.pp=2", "parallel.tp=2", "train.global_batch_size=16")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first"
    make_run(path, STEPS, *LAYOUT)
    write_report([path])
    return path


def charts_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', path.read_text())
    assert found
    return {chart["name"]: chart for chart in json.loads(found[1])}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def own_text(path: Path) -> str:
    """The page without the text of Plotly's script."""
    parts = re.split(r"(<script>.*?</script>)", path.read_text(), flags=re.DOTALL)
    return "".join(part for part in parts if "plotly.js v" not in part)


def test_curves_are_the_steps(directory: Path) -> None:
    charts, steps = charts_of(directory / "report.html"), rows(directory / "steps.jsonl")
    for name, of in (("loss", "loss"), ("grad-norm", "grad_norm"), ("throughput", "tokens_per_second")):
        trace = charts[name]["figures"][0]["data"][0]
        assert trace["x"] == [step["step"] for step in steps]
        assert [y and pytest.approx(y, rel=1e-5) for y in trace["y"]] == [step[of] for step in steps]
    validation = charts["loss"]["figures"][0]["data"][1]
    assert validation["x"] == [row["step"] for row in rows(directory / "validation.jsonl")]
    skipped = charts["grad-norm"]["figures"][0]["data"][1]
    assert skipped["x"] == [step["step"] for step in steps if not step["applied"]] == [50]


def test_long_runs_have_a_mean_over_the_single_steps(tmp_path: Path) -> None:
    make_run(tmp_path / "long", 400, ranks=False)
    write_report([tmp_path / "long"])
    raw, mean = charts_of(tmp_path / "long" / "report.html")["throughput"]["figures"][0]["data"]
    assert mean["name"] == "throughput, mean of 4 steps"
    assert mean["y"][9] == pytest.approx(sum(raw["y"][6:10]) / 4, rel=1e-5)


def test_memory_is_that_of_the_ranks(directory: Path) -> None:
    figure = charts_of(directory / "report.html")["memory"]["figures"][0]
    for rank in range(8):
        ledger = json.loads((directory / "ranks" / f"{rank}.json").read_text())["memory"]
        for origin, shift in (("estimated", -0.2), ("measured", 0.2)):
            shown = {
                trace["name"]: bytes_
                for trace in figure["data"]
                for x, (of, bytes_) in zip(trace["x"], trace["customdata"], strict=True)
                if of == rank and x == rank + shift
            }
            assert shown["peak"] == ledger[origin]["peak"]
            assert all(shown[name] == ledger[origin][name] for name in shown)
            assert {"parameters", "gradients", "optimizer", "activations"} <= set(shown)


def test_communication_is_that_of_the_ranks(directory: Path) -> None:
    chart = charts_of(directory / "report.html")["communication"]
    assert [figure["label"] for figure in chart["figures"]] == [f"rank {rank}" for rank in range(8)]
    ledger = json.loads((directory / "ranks" / "3.json").read_text())["communication"]
    measured, estimated = chart["figures"][3]["data"]
    for trace, kind, steps in ((measured, "measured", STEPS), (estimated, "estimated_per_step", 1)):
        shown = {tuple(row[:3]): row[3:] for row in trace["customdata"]}
        assert shown == {
            (row["verb"], row["axis"], row["reason"]): [row["sent_bytes"] / steps, row["calls"] / steps]
            for row in ledger[kind]
        }


def test_timeline_shows_every_action_planned_and_measured(directory: Path) -> None:
    run = read_run(directory)
    chart = charts_of(directory / "report.html")["timeline"]
    assert len(chart["figures"]) == 4
    numbers = dict(chart["figures"][0]["numbers"])
    schedule = computing_schedule_of(run.plan)
    expected = sorted(action.in_words for actions in schedule.actions for action in actions)
    for axis in ("y", "y2"):
        traces = [t for t in chart["figures"][0]["data"] if t["yaxis"] == axis and t["name"] in "FBIW"]
        assert sorted(text.split(",")[0] for trace in traces for text in trace["customdata"]) == expected
    transfers = [t for t in chart["figures"][0]["data"] if t["name"] in ("sends", "receives")]
    assert sum(len(trace["x"]) for trace in transfers) == 4 * run.plan.num_microbatches
    assert numbers["bubble, planned"] == f"{totals_of(run.plan).bubble:.0%}".replace("%", " %")


def test_bubbles_of_a_step_that_went_as_planned(directory: Path) -> None:
    run = read_run(directory)
    for pipeline in pipelines(run):
        measured = pipeline.measured
        assert measured is not None
        assert [run.plan.topology.coordinate(rank).pp for rank in pipeline.ranks] == [0, 1]
        assert measured.times.makespan == pytest.approx(STEP, rel=1e-3)
        assert measured.times.replayed == pytest.approx(STEP, rel=2e-3)
        assert measured.bubble == pytest.approx(pipeline.planned.bubble, abs=2e-3)
        assert sum(pipeline.planned.busy) == pytest.approx(sum(measured.times.busy))


def test_without_a_timeline_the_plan_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "early", 0, ranks=False)
    assert write_report([tmp_path / "early"]) == [tmp_path / "early" / "report.html"]  # and no trace
    page, charts = tmp_path / "early" / "report.html", charts_of(tmp_path / "early" / "report.html")
    assert "no steps yet" in own_text(page)
    assert charts["loss"]["note"] == "No steps yet: early."
    assert "memory" not in charts and "communication" not in charts
    (figure,) = charts["timeline"]["figures"]
    assert figure["layout"]["xaxis"]["title"]["text"] == "% of the planned step"
    assert max(b + x for t in figure["data"] for b, x in zip(t["base"], t["x"], strict=True)) == pytest.approx(100)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    runs = [tmp_path / "<script>alert(1)<" / name for name in ("<img src=x onerror=alert(2)>", "b")]
    for run in runs:
        make_run(run, 3)
    write_report(runs, tmp_path / "both.html")
    text = own_text(tmp_path / "both.html")
    assert "<script>alert" not in text and "<img" not in text
    assert "&lt;img src=x onerror=alert(2)&gt;" in text
    names = [trace["name"] for trace in charts_of(tmp_path / "both.html")["loss"]["figures"][0]["data"]]
    assert names[0] == "&lt;img src=x onerror=alert(2)&gt;"  # Plotly shows it as the name


def test_nothing_is_loaded_from_elsewhere(directory: Path) -> None:
    text = own_text(directory / "report.html")
    assert "http://" not in text and "https://" not in text
    assert not re.search(r"<(link|img|iframe|script[^>]* src)|@import|url\(", text)
    assert "default-src 'none'" in text
    assert "sendChartToCloud" in text  # among the buttons that are taken away


def test_several_runs_lie_over_one_another(directory: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "first", 20)
    make_run(tmp_path / "third", 20)
    runs = [directory, tmp_path / "first", tmp_path / "third"]
    written = write_report(runs, tmp_path / "all.html")
    assert [path.name for path in written] == ["all.html", "all.trace.json"]
    charts = charts_of(tmp_path / "all.html")
    assert [t["name"] for t in charts["throughput"]["figures"][0]["data"]] == [str(directory), str(runs[1]), "third"]
    assert len(charts["memory"]["figures"]) == 3
    assert len(charts["communication"]["figures"]) == 8 + 4 + 4
    assert "<h2>Runs</h2>" in own_text(tmp_path / "all.html")


def test_trace_holds_every_segment(directory: Path) -> None:
    events = json.loads((directory / "trace.json").read_text())["traceEvents"]
    for rank in range(8):
        timeline = json.loads((directory / "ranks" / f"{rank}.json").read_text())["timeline"]
        actions = [e for e in events if e["ph"] == "X" and e["pid"] == rank and e["tid"] == 0]
        assert [e["name"] for e in actions] == [segment[0] for segment in timeline["segments"]]
        assert actions[-1]["ts"] + actions[-1]["dur"] == pytest.approx(timeline["segments"][-1][2] * 1e6, abs=0.2)
        waits = [e["name"] for e in events if e["ph"] == "X" and e["pid"] == rank and e["tid"] == 1]
        assert waits == [wait[0] for wait in timeline["waits"]]
    places = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert sorted(places.values()) == list(range(8))


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing: no such directory"):
        write_report([tmp_path / "missing"])
    with pytest.raises(RunError, match=r"is no run directory: it has no plan\.json"):
        write_report([tmp_path])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("plan.json", "{"),
        ("plan.json", "[]"),
        ("steps.jsonl", '{"step": 1}\n'),
        ("ranks/1.json", "{"),
        ("ranks/1.json", '{"rank": 1}'),
        ("ranks/1.json", "\x00"),
        ("ranks/1.json", "null"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str) -> None:
    make_run(tmp_path / "run", 3)
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(RunError) as refused:
        write_report([tmp_path / "run"])
    assert f"{file}: damaged" in refused.value.problem and "\n" not in refused.value.problem


def test_ranks_whose_files_are_elsewhere_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    (tmp_path / "run" / "ranks" / "3.json").unlink()
    write_report([tmp_path / "run"])
    charts = charts_of(tmp_path / "run" / "report.html")
    assert len(charts["timeline"]["figures"]) == 1
    assert len(charts["communication"]["figures"]) == 3


def test_command(directory: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(directory), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(tmp_path / "report.html"), str(tmp_path / "trace.json")]
    with pytest.raises(RunError, match=r"--out: .* cannot be written"):
        write_report([directory], tmp_path / "missing" / "report.html")
