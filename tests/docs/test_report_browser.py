"""The report in a real browser, headless: no error, charts with data, hover, switching, and no slower than said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwright.report.files import write_report
from tests.docs.browser import CHROMIUM, Browser
from tests.docs.comparison_document import make_comparison
from tests.docs.report_run import make_run

CHARTS = ("loss", "grad-norm", "throughput", "step-time", "timeline", "memory", "communication")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: tools/install_chromium.sh installs it")

LOOK = """
(() => {
  const sizes = (trace) => [trace.name, trace.x.length];
  const found = {};
  for (const section of document.querySelectorAll("section:has(.plot)")) {
    const plot = section.querySelector(".plot");
    const seen = (found[section.id] = { data: plot.data.map(sizes) });
    seen.paths = plot.querySelectorAll(".scatterlayer path, .barlayer path").length;
    const curve = plot.data.findIndex((trace) => trace.x.length && trace.hoverinfo !== "skip");
    if (curve >= 0) Plotly.Fx.hover(plot, [{ curveNumber: curve, pointNumber: 0 }]);
    seen.hover = plot.querySelector(".hoverlayer").textContent;
    Plotly.Fx.unhover(plot);
    const buttons = [...plot.querySelectorAll(".modebar-btn")].map((button) => button.dataset.title || "");
    seen.leaves = buttons.filter((title) => /cloud|studio|share/i.test(title));
    seen.zooms = buttons.some((title) => /zoom/i.test(title));
    const log = section.querySelector("input");
    if (log) { log.click(); seen.log = plot.layout.yaxis.type; log.click(); }
    const select = section.querySelector("select");
    if (!select) continue;
    seen.numbers = section.querySelector(".numbers").textContent;
    select.value = String(select.options.length - 1);
    select.dispatchEvent(new Event("change"));
    seen.last = { label: select.selectedOptions[0].text, data: plot.data.map(sizes) };
  }
  return found;
})()
"""

MIDDLE = """
(() => {
  const box = document.querySelector("#throughput .nsewdrag").getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
})()
"""

HOVERED = """
new Promise((done) => {
  const look = (left) => {
    const text = document.querySelector("#throughput .hoverlayer").textContent;
    text || !left ? done(text) : setTimeout(look, 50, left - 1);
  };
  look(100);
})
"""


def check(browser: Browser, page: Path, charts: tuple[str, ...] = CHARTS) -> dict[str, Any]:
    """No error, nothing asked of others, and every chart is drawn with data and answers; gives what was found."""
    found = browser.evaluate(LOOK)
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith(("blob:", "data:"))] == [page.as_uri()]
    assert tuple(found) == charts
    for name, chart in found.items():
        assert chart["data"] and all(size for _, size in chart["data"]), name
        assert chart["paths"] and chart["hover"] and chart["zooms"], name
        assert chart["leaves"] == [], name
    return found


def test_a_small_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 60)
    page = write_report([tmp_path / "run"])[0]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.point(*browser.evaluate(MIDDLE))
        assert "throughput" in browser.evaluate(HOVERED)
        charts = check(browser, page)
    assert charts["loss"]["data"] == [["loss", 60], ["validation", 7]]
    assert charts["loss"]["log"] == "log"
    assert "rank 0: F stage 0 microbatch 0, begin 0.000" in charts["timeline"]["hover"]
    assert "bubble, measured" in charts["timeline"]["numbers"]
    assert charts["timeline"]["last"]["label"].startswith("replicate 0, shard 1, tp 0")
    assert charts["communication"]["last"]["label"] == "rank 3"
    assert "rank 0, parameters estimated" in charts["memory"]["hover"]


def test_a_run_of_one_rank(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3, "parallel.dp=1", "parallel.pp=1")
    page = write_report([tmp_path / "run"])[0]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        charts = check(browser, page, CHARTS[:-1])  # one rank sends nothing
    assert {"F", "B", "other phases"} == {name for name, _ in charts["timeline"]["data"]}


def test_a_run_without_steps(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 0, ranks=False)
    with Browser(tmp_path / "profile") as browser:
        browser.open(write_report([tmp_path / "run"])[0])
        charts = browser.evaluate(LOOK)
        assert browser.problems == []
    assert charts["timeline"]["paths"]


def test_several_runs_with_hostile_names(tmp_path: Path) -> None:
    names = ("<script>alert(1)<", "<img src=x onerror=alert(2)>")
    for name in names:
        make_run(tmp_path / name, 250)
    page = write_report([tmp_path / name for name in names], tmp_path / "all.html")[0]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        charts = check(browser, page)
    assert charts["memory"]["last"]["label"] == names[1]


def test_a_comparison(tmp_path: Path) -> None:
    make_comparison(tmp_path / "compare-tiny")
    page = write_report([tmp_path / "compare-tiny"])[0]
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        charts = check(browser, page, ("times", "bubble", "memory", "sent", "largest"))
    assert "one device: 300 ms" in charts["times"]["hover"]
    assert "one device" in charts["memory"]["hover"] and "1,000,003 bytes" in charts["memory"]["hover"]
    assert "planned efficiency 89 %" in charts["largest"]["hover"]


def test_a_large_run_is_there_in_two_seconds(tmp_path: Path) -> None:
    """10,000 steps and 64 ranks, from opening the page to the last chart drawn: seconds of the main thread, so that
    other work on the machine does not count; the best of four in a browser that runs."""
    sizes = ("train.global_batch_size=64", "train.micro_batch_size=1", "model.layers=16")
    make_run(tmp_path / "run", 10_000, "parallel.dp=4", "parallel.pp=8", "parallel.tp=2", *sizes)
    page = write_report([tmp_path / "run"])[0]
    with Browser(tmp_path / "profile") as browser:
        seconds = [browser.open(page)]
        charts = check(browser, page)
        seconds += [browser.open(page) for _ in range(3)]
    assert charts["throughput"]["data"][0] == ["throughput", 10_000]
    assert {size for _, size in charts["memory"]["data"]} == {64}
    assert min(seconds) < 2, seconds
