"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const details = document.getElementById("details");

// An element. What it holds is text or elements, never HTML: answers of a model are hostile.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const section = (title, ...children) => {
  main.append(el("h2", {}, title), ...children);
};
const number = (value, digits = 4) =>
  value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits)));
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");

// A plot was drawn by matplotlib as SVG: an image of this file's own, which can do nothing.
function plots(drawn) {
  const box = el("div", { class: "plots" });
  for (const plot of drawn) {
    const image = el("img", { src: "data:image/svg+xml;base64," + plot.svg, alt: plot.title, style: "width:100%" });
    box.append(el("figure", {}, image));
  }
  return box;
}

// A table whose columns sort on a click. columns: {name, title, text?, show?}.
function sortable(columns, rows, rowId) {
  const body = el("tbody");
  const draw = () => body.replaceChildren(...rows.map((row) => el("tr", { id: rowId ? rowId(row) : null },
    ...columns.map((c) => el("td", { class: c.text ? "text" : null }, c.show ? c.show(row[c.name], row) : shown(row[c.name]))))));
  let last = "", down = false;
  const sort = (name) => {
    down = last === name ? !down : false; last = name;
    rows.sort((a, b) => {
      const [x, y] = [a[name], b[name]];
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
    draw();
  };
  const head = el("tr", {}, ...columns.map((c) => el("th", { class: c.text ? "text" : null },
    el("button", { onclick: () => sort(c.name) }, c.title || c.name))));
  draw();
  return el("div", { class: "wide" }, el("table", {}, el("thead", {}, head), body));
}
function shown(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "number" ? number(value) : String(value);
}
function save(name, text) {
  const link = el("a", { href: "data:text/plain;charset=utf-8," + encodeURIComponent(text), download: name });
  link.click();
}
function open(title, ...children) {
  const close = el("button", { onclick: () => details.close() }, "close");
  details.replaceChildren(el("header", {}, el("h2", {}, title), close), ...children);
  if (!details.open) details.showModal();
  details.scrollTop = 0;
}
