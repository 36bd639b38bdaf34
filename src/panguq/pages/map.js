"use strict";
const COLOURS = { ok: "#9bd5a0", degraded: "#ffe08a", collapsed: "#f2938c", "non-finite": "#c79be8",
  repetitive: "#f5b87a", refused: "#cfcfcf", chance: "#b9d3ee", failed: "#d8a9a9" };
const cells = data.cells;
const column = (cell) => cell.task + (cell.thinking ? "/" + cell.thinking : "");
const recipes = [...new Set(cells.map((c) => c.recipe))];
const columns = [...new Set(cells.map(column))];
const find = (recipe, name) => cells.find((c) => c.recipe === recipe && column(c) === name);
const isPerplexity = (cell) => cell.kind === "perplexity";
const value = (cell) => isPerplexity(cell) ? number(cell.value) : percent(cell.value);
const difference = (cell) => cell.difference === null || cell.difference === undefined ? "" :
  isPerplexity(cell) ? signed(cell.difference) : signed(100 * cell.difference);
const signed = (x) => (x >= 0 ? "+" : "−") + number(Math.abs(x), 3);
const interval = (cell) => {
  if (cell.low === null || cell.low === undefined) return "";
  const scale = isPerplexity(cell) ? 1 : 100;
  return "[" + signed(scale * cell.low) + ", " + signed(scale * cell.high) + "]";
};

main.append(el("h1", {}, "Accuracy map of " + data.model));
main.append(el("p", {}, "Difference to the float model, paired over the same items, with its 95 % interval. Accuracies are in percent and their differences in points; perplexities are as they are. A click on a cell shows what it is made of."));
main.append(el("p", { class: "legend" }, ...Object.entries(COLOURS).map(([name, colour]) => el("span", { style: "background:" + colour }, name))));

const head = el("tr", {}, el("th", {}, "recipe"), ...columns.map((name) => el("th", {}, name)));
const grid = el("tbody", {}, ...recipes.map((recipe) => el("tr", {}, el("td", {}, recipe), ...columns.map((name) => {
  const cell = find(recipe, name);
  if (!cell) return el("td", { class: "none" }, "·");
  const show = () => { location.hash = "cell=" + encodeURIComponent(cell.name); };
  const below = recipe === "float" ? "" : interval(cell);
  return el("td", { class: "cell", tabindex: 0, id: cell.name, style: "background:" + COLOURS[cell.status],
    title: cell.status + (cell.reason ? ": " + cell.reason : ""), onclick: show,
    onkeydown: (event) => { if (event.key === "Enter") show(); } },
    recipe === "float" || !difference(cell) ? (cell.value === null ? cell.status : value(cell)) : difference(cell),
    el("small", {}, below || cell.status));
}))));
section("Recipes × tasks", el("div", { class: "wide" }, el("table", { id: "heat" }, el("thead", {}, head), grid)));

if (data.plots.length) section("Bits against quality", plots(data.plots));
else section("Bits against quality", el("p", {}, "The plots need matplotlib: pip install 'panguq[plots]', then panguq map --report."));

const generated = cells.filter((c) => c.tokens_mean !== undefined && c.tokens_mean !== null);
if (generated.length) section("Tokens an answer", sortable([
  { name: "recipe" }, { name: "task", show: (_, c) => column(c) }, { name: "tokens_mean", title: "mean" },
  { name: "tokens_p90", title: "P90" }, { name: "inflation", title: "of float's", show: (x) => x === null || x === undefined ? "–" : number(x, 3) + " ×" },
  { name: "cut_off", title: "cut off", show: percent }, { name: "loops", title: "loop", show: percent },
  { name: "ties", title: "ties" }], [...generated]));

const listed = [...cells];
const FIELDS = data.fields;
section("All cells", el("div", { class: "tools" },
  el("button", { onclick: () => save("map.csv", csv()) }, "CSV"),
  el("button", { onclick: () => save("map.md", markdown()) }, "Markdown")),
  sortable([{ name: "recipe" }, { name: "task", show: (_, c) => el("a", { href: "#cell=" + encodeURIComponent(c.name) }, column(c)) },
    { name: "status" }, { name: "value", show: (_, c) => c.value === null || c.value === undefined ? "–" : value(c) }, { name: "stderr" },
    { name: "difference", show: (_, c) => difference(c) || "–" }, { name: "p" },
    { name: "right_to_wrong", title: "right→wrong" }, { name: "wrong_to_right", title: "wrong→right" },
    { name: "kl", title: "KL" }, { name: "top1", title: "top-1", show: percent }, { name: "items" },
    { name: "bits_per_weight", title: "bits" }, { name: "seconds" }, { name: "peak_mib", title: "MiB" },
    { name: "reason", text: true }], listed));

function csv() {
  const quote = (x) => x === null || x === undefined ? "" : /[",\n]/.test(String(x)) ? '"' + String(x).replaceAll('"', '""') + '"' : String(x);
  return [FIELDS.join(","), ...cells.map((c) => FIELDS.map((f) => quote(c[f])).join(","))].join("\n") + "\n";
}
// The study's table: a line a recipe, a column a task.
function markdown() {
  const line = (parts) => "| " + parts.join(" | ") + " |";
  const rows = recipes.map((recipe) => line([recipe, ...columns.map((name) => {
    const cell = find(recipe, name);
    if (!cell) return "";
    return cell.value === null || cell.value === undefined ? cell.status : value(cell) + (["ok", "chance"].includes(cell.status) ? "" : " (" + cell.status + ")");
  })]));
  return [line(["recipe", ...columns]), line(["---", ...columns.map(() => "---")]), ...rows].join("\n") + "\n";
}

function show(cell) {
  const facts = [["status", cell.status + (cell.reason ? ": " + cell.reason : "")], ["value", cell.value === null ? "–" : value(cell) + " ± " + number(cell.stderr, 2)],
    ["float", cell.float_value === undefined || cell.float_value === null ? "–" : isPerplexity(cell) ? number(cell.float_value) : percent(cell.float_value)],
    ["difference", difference(cell) + " " + interval(cell) + (cell.p === null || cell.p === undefined ? "" : ", p = " + number(cell.p, 2))],
    ["flips", cell.right_to_wrong === null || cell.right_to_wrong === undefined ? "–" : cell.right_to_wrong + " right → wrong, " + cell.wrong_to_right + " wrong → right"],
    ["KL, top-1", number(cell.kl, 3) + " nats, " + percent(cell.top1)], ["first broken", cell.first_broken || "–"],
    ["pass@k", cell.pass_at_k && Object.keys(cell.pass_at_k).length ? Object.entries(cell.pass_at_k).map(([k, v]) => "@" + k + " " + percent(v)).join(", ") : "–"],
    ["protocol", cell.protocol], ["items", cell.items + (cell.all_items ? " of " + cell.all_items : "") + ", seed " + cell.seed],
    ["cost", number(cell.seconds) + " s, " + (cell.peak_mib ?? "–") + " MiB, " + number(cell.bits_per_weight, 3) + " bits a weight"]];
  const table = el("table", {}, ...facts.map(([name, said]) => el("tr", {}, el("td", {}, name), el("td", { class: "text" }, said))));
  const answers = (cell.shown || []).map((item) => el("div", {}, el("h3", {}, "Asked"), el("pre", {}, item.prompt), el("div", { class: "answers" },
    ...[["float", item.float], [cell.recipe, item.answer], ["right", item.right]].map(([who, said]) => el("div", {}, el("strong", {}, who), el("pre", {}, said || "–"))))));
  open(cell.recipe + " · " + column(cell), table, el("h3", {}, "Command"), el("pre", {}, cell.command || "–"),
    ...answers, el("h3", {}, "Log"), el("pre", {}, cell.log || "(nothing was said)"));
}
function follow() {
  const name = decodeURIComponent(location.hash.replace("#cell=", ""));
  const cell = cells.find((c) => c.name === name);
  if (cell) show(cell);
}
details.addEventListener("close", () => history.replaceState(null, "", location.pathname));
addEventListener("hashchange", follow);
follow();
