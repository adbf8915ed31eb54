"use strict";
// Sorts the board by any column and shows it a page at a time, so that ten thousand lines stay usable. All text in the
// data is foreign: the page only ever sets textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("thead th")];
  const search = document.querySelector("input"), more = document.querySelector("[data-more]");
  const told = document.querySelector("[data-told]");
  const state = { by: 0, down: false, shown: data.page };

  // Missing values stay last, whichever way the others stand.
  function order(a, b) {
    const x = a.keys[state.by], y = b.keys[state.by];
    if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
    const found = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (state.down ? -found : found) || a.place - b.place;
  }

  function line(entry) {
    const row = document.createElement("tr");
    entry.cells.forEach((text, i) => {
      const cell = document.createElement(i === 1 ? "th" : "td");
      if (i === 1) cell.scope = "row"; else cell.className = "num";
      if (i === data.rate && entry.keys[i] !== null) {
        cell.className = "num rate";
        cell.style.setProperty("--share", `${100 * entry.keys[i]}%`);
      }
      cell.textContent = text;
      row.append(cell);
    });
    return row;
  }

  const lines = data.lines.map(([cells, keys], place) => ({ cells, keys, place }));
  function draw() {
    const asked = search.value.trim().toLowerCase();
    const found = lines.filter((entry) => entry.cells[1].toLowerCase().includes(asked)).sort(order);
    body.replaceChildren(...found.slice(0, state.shown).map(line));
    heads.forEach((head, i) => {
      if (i === state.by) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const shown = Math.min(state.shown, found.length);
    told.textContent = shown < found.length ? `${shown} of ${found.length} shown` : `${found.length} shown`;
    more.hidden = shown === found.length;
  }

  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const first = data.down[i];       // the first press puts the best on top
    state.down = state.by === i ? !state.down : first;
    state.by = i;
    state.shown = data.page;
    draw();
  }));
  search.addEventListener("input", () => { state.shown = data.page; draw(); });
  more.addEventListener("click", () => { state.shown += 5 * data.page; draw(); });
  document.querySelector(".bar").hidden = false;
  draw();
})();
