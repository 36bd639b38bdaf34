"use strict";
main.append(el("h1", {}, "Compile of " + data.recipe + " for " + data.target), el("pre", {}, data.summary));

const stageLink = (name) => el("a", { href: "#stage=" + encodeURIComponent(name) }, name);
const matmulLink = (name) => name ? el("a", { href: "#matmul=" + encodeURIComponent(name) }, name) : "–";
section("Passes", sortable([
  { name: "name", title: "pass", show: stageLink }, { name: "changed" }, { name: "seconds" },
  { name: "exact", show: (x) => x ? "exact" : "lossy" }, { name: "worst_db", title: "worst local SQNR, dB" },
  { name: "worst", title: "of", show: matmulLink }], data.stages.map((s) => ({ ...s })), (s) => "pass-" + s.name));

// From red at 5 dB to green at 40 dB.
const colour = (db) => `hsl(${Math.max(0, Math.min(1, (db - 5) / 35)) * 120} 65% 75%)`;
const stages = Object.keys(data.sqnr);
if (stages.length) {
  const first = data.sqnr[stages[0]], last = data.sqnr[stages[stages.length - 1]];
  const head = el("tr", {}, el("th", {}, "matmul"), ...data.grid.layers.map((layer) => el("th", {}, layer)));
  const rows = Object.entries(data.grid.kinds).map(([kind, byLayer]) => el("tr", {}, el("td", {}, kind),
    ...data.grid.layers.map((layer) => {
      const name = byLayer[layer];
      if (name === undefined) return el("td", { class: "none" }, "·");
      const go = () => { location.hash = "matmul=" + encodeURIComponent(name); };
      return el("td", { class: "cell", tabindex: 0, style: "background:" + colour(last[name]), title: name, onclick: go,
        onkeydown: (event) => { if (event.key === "Enter") go(); } },
        number(last[name], 3), el("small", {}, first[name] === undefined ? "" : number(first[name], 3) + " →"));
    })));
  section("Local SQNR in dB, layers × matmuls: after " + stages[0] + " → after " + stages[stages.length - 1],
    el("div", { class: "wide" }, el("table", { id: "heat" }, el("thead", {}, head), el("tbody", {}, ...rows))));
} else section("Local SQNR", el("p", {}, data.note));

if (data.ranges.length) section("Ranges of activations", el("p", {}, "Marked: massive channels, the largest more than " + data.massive + " times the median one, or massive tokens."),
  sortable([{ name: "value", show: (x, row) => row.channel_ratio > data.massive || row.massive_tokens > 0 ? el("strong", { class: "marked" }, x) : x },
    { name: "amax" }, { name: "plain_amax", title: "amax, plain tokens" }, { name: "massive_tokens", title: "massive tokens" },
    { name: "channel_ratio", title: "channel ratio" }, { name: "low" }, { name: "high" }, { name: "input_sqnr_db", title: "input SQNR, dB" }],
  data.ranges.map((row) => ({ ...row }))));
if (data.kernels.length) section("Kernels", data.plots.length ? plots(data.plots) : el("p", {}, "The plots need matplotlib: pip install 'panguq[plots]'."),
  sortable(Object.keys(data.kernels[0]).map((name) => ({ name, text: name === "others", show: name === "matmul" ? matmulLink : undefined })),
    data.kernels.map((row) => ({ ...row }))));

function showStage(stage) {
  const lines = stage.diff.split("\n").map((line) => el(line.startsWith("+") ? "ins" : line.startsWith("-") ? "del" : "span", {}, line + "\n"));
  open(stage.name, stage.error ? el("pre", {}, stage.error) : null,
    stage.skipped.length ? sortable(Object.keys(stage.skipped[0]).map((name) => ({ name, text: true })), stage.skipped) : null,
    el("h3", {}, "Diff"), el("pre", {}, ...(stage.diff ? lines : ["It changed nothing that the graph shows."])),
    stage.cut ? el("p", {}, "The diff goes on: panguq show has all of it.") : null);
}
function showMatmul(name) {
  const path = name.split(":")[0];
  const kernel = data.kernels.find((row) => row.matmul === name);
  const facts = stages.map((stage) => [stage, data.sqnr[stage][name] === undefined ? "–" : number(data.sqnr[stage][name], 3) + " dB"]);
  if (kernel) facts.push(...Object.entries(kernel).filter(([, x]) => x !== "" && x !== null).map(([key, x]) => [key, shown(x)]));
  const table = el("table", {}, ...facts.map(([key, x]) => el("tr", {}, el("td", {}, key), el("td", { class: "text" }, x))));
  const changes = data.stages.filter((stage) => stage.diff.includes(path)).map((stage) => el("li", {}, stageLink(stage.name)));
  open(name, table, el("h3", {}, "Passes whose diff names it"), el("ul", {}, ...changes));
}
function follow() {
  const [kind, rest] = location.hash.slice(1).split("=");
  if (!rest) return;
  const name = decodeURIComponent(rest);
  const stage = data.stages.find((s) => s.name === name);
  if (kind === "stage" && stage) showStage(stage);
  if (kind === "matmul") showMatmul(name);
}
details.addEventListener("close", () => history.replaceState(null, "", location.pathname));
addEventListener("hashchange", follow);
follow();
