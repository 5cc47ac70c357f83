"use strict";
// Draws each chart's chosen figure. A figure is complete: traces, layout, and the numbers above it.
const common = {
  font: { family: 'system-ui, "DejaVu Sans", sans-serif', size: 12, color: "#1b2430" },
  margin: { l: 64, r: 40, t: 28, b: 44 },
  modebar: { orientation: "v" },
  paper_bgcolor: "#ffffff",
  plot_bgcolor: "#ffffff",
  legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
  hoverlabel: { align: "left", namelength: -1 },
};
const axis = { gridcolor: "#e8ebef", linecolor: "#c3c9d1", zerolinecolor: "#c3c9d1" };
const config = {
  responsive: true,
  displaylogo: false,
  showTips: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"], // nothing leaves the page
};

function layoutOf(chart, figure, log) {
  const layout = { ...common, height: chart.height, ...figure.layout };
  layout.legend = { ...common.legend, ...figure.layout.legend };
  for (const name of ["xaxis", "yaxis", "yaxis2"]) {
    if (name === "yaxis2" && !figure.layout[name]) continue;
    layout[name] = { ...axis, ...figure.layout[name] };
  }
  if (log) layout.yaxis.type = "log";
  return layout;
}

function show(chart) {
  const section = document.getElementById(chart.name);
  const select = section.querySelector("select");
  const log = section.querySelector("input");
  const figure = chart.figures[select ? Number(select.value) : 0];
  const numbers = section.querySelector(".numbers");
  numbers.replaceChildren();
  for (const [label, value] of figure.numbers) {
    const [entry, term, says] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    term.textContent = label;
    says.textContent = value;
    entry.append(term, says);
    numbers.append(entry);
  }
  const plot = section.querySelector(".plot");
  Plotly.react(plot, figure.data, layoutOf(chart, figure, log && log.checked), config);
}

for (const chart of JSON.parse(document.getElementById("charts").textContent)) {
  for (const input of document.getElementById(chart.name).querySelectorAll("select, input")) {
    input.addEventListener("change", () => show(chart));
  }
  show(chart);
}
document.body.dataset.drawn = String(Math.round(performance.now()));
