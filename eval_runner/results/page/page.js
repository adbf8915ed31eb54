"use strict";
// Draws the charts that come into view. All text in the data is foreign: Plotly reads tags in its texts, so
// every text is escaped on its way in; the page itself only ever sets textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const state = { axis: "step", hidden: new Set() };
  const drawn = new Set();

  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const short = (v) => (v === null ? "unknown" : Number(v.toPrecision(5)).toString());
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function traces(metric) {
    return metric.lines.filter((line) => !state.hidden.has(line.run)).map((line) => {
      const run = data.runs[line.run];
      const points = line.at.map((i) => run.checkpoints[i]);
      return {
        type: "scatter",
        mode: "lines+markers",
        name: plain(run.name),
        x: points.map((p) => (state.axis === "tokens" ? p.tokens / 1e9 : p.step)),
        y: line.value,
        error_y: {
          type: "data", symmetric: false, color: run.color + (points.length > 40 ? "40" : "99"), thickness: 1.2, width: points.length > 40 ? 0 : 3,
          array: line.value.map((v, i) => (line.high[i] === null ? 0 : Math.max(0, line.high[i] - v))),
          arrayminus: line.value.map((v, i) => (line.low[i] === null ? 0 : Math.max(0, v - line.low[i]))),
        },
        text: points.map((p, i) => [
          `<b>${plain(run.name)}</b>`,
          `step ${p.step}` + (p.tokens === null ? "" : `, ${short(p.tokens / 1e9)} B tokens`),
          `${short(line.value[i])}  (95 %: ` +
            (line.low[i] === null ? "unknown" : `${short(line.low[i])} to ${short(line.high[i])}`) + ")",
          `n = ${line.n[i]}`,
          plain(p.checkpoint),
        ].join("<br>")),
        hoverinfo: "text",
        line: { color: run.color, width: 2, dash: dashes[Math.floor(line.run / data.colors) % dashes.length] },
        marker: { color: run.color, size: points.length > 40 ? 4 : 7 },
      };
    });
  }

  // Where the judge changed: midway between the last checkpoint of the one and the first of the other.
  function breaks(metric, lines) {
    const found = new Map();
    metric.lines.filter((line) => !state.hidden.has(line.run)).forEach((line, index) => {
      for (const [i, change] of line.judges || []) {
        const x = (lines[index].x[i - 1] + lines[index].x[i]) / 2;
        found.set(x, [...(found.get(x) || []), `${data.runs[line.run].name}: ${change}`]);
      }
    });
    return [...found];
  }

  function draw(figure) {
    const metrics = data.charts[figure.dataset.chart].metrics;
    const select = figure.querySelector("select");
    const metric = metrics[select ? select.selectedIndex : 0];
    const grid = css("--line"), soft = css("--soft");
    figure.querySelector(".direction").textContent = metric.direction;
    const axis = { gridcolor: grid, linecolor: grid, zeroline: false, exponentformat: "power", tickfont: { color: soft, size: 12 } };
    const lines = traces(metric), judges = breaks(metric, lines);
    const places = lines.flatMap((line) => line.x);
    const range = Math.max(...places) - Math.min(...places);
    let ticks = { nticks: 7 };
    if (range === 0) ticks = { tickmode: "array", tickvals: places.slice(0, 1) };
    else if (state.axis === "step" && range < 7) ticks = { dtick: 1 };     // no tick between two steps
    const title = (text) => ({ text, font: { color: soft, size: 12 }, standoff: 8 });
    Plotly.react(figure.querySelector(".plot"), lines, {
      margin: { l: 52, r: 12, t: 10, b: 42 },
      showlegend: false,
      hovermode: "closest",
      hoverlabel: { align: "left", font: { size: 12.5 } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: css("--link") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink") },
      shapes: judges.map(([x]) => ({
        type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: soft, width: 1.2, dash: "dash" },
      })),
      annotations: judges.map(([x, changes]) => ({
        x, yref: "paper", y: 1, yanchor: "top", xanchor: "right", textangle: -90, showarrow: false,
        text: "judge changed", font: { color: soft, size: 11 }, hovertext: changes.map(plain).join("<br>"),
      })),
      xaxis: {
        ...axis, ...ticks,
        title: title(state.axis === "tokens" ? "tokens (billions)" : "step"),
        tickformat: state.axis === "tokens" ? "" : ",d",
      },
      yaxis: { ...axis, automargin: true, nticks: 6 },
    }, {
      responsive: true, displaylogo: false,
      // By name, since Plotly's default buttons include one that sends the data away.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    });
    drawn.add(figure);
  }
  const redraw = () => drawn.forEach(draw);

  function press(group, act) {
    for (const button of group.querySelectorAll("button")) {
      button.addEventListener("click", () => { act(button, group); redraw(); });
    }
  }
  for (const group of document.querySelectorAll(".axis")) {
    press(group, (button) => {
      state.axis = button.value;
      for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    });
  }
  for (const group of document.querySelectorAll(".legend")) {
    press(group, (button) => {
      const run = Number(button.value);
      if (!state.hidden.delete(run)) state.hidden.add(run);
      button.setAttribute("aria-pressed", !state.hidden.has(run));
    });
  }
  for (const select of document.querySelectorAll("figure select")) {
    select.addEventListener("change", () => draw(select.closest("figure")));
  }
  dark.addEventListener("change", redraw);

  const view = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { view.unobserve(entry.target); draw(entry.target); }
    }
  }, { rootMargin: "400px" });
  figures.forEach((figure) => view.observe(figure));
  addEventListener("beforeprint", () => figures.forEach(draw));
})();
