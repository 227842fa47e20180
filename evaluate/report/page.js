"use strict";
// Without this script every card is there; it only hides and counts.
const form = document.querySelector("#filters");
const more = document.querySelector("#more");
const cards = [...document.querySelectorAll("article")];
const totals = JSON.parse(document.querySelector("#totals")?.textContent ?? "{}");
const AT_ONCE = matchMedia("(max-width: 40rem)").matches ? 6 : 12;
let most = AT_ONCE;

function matches(card, { run, benchmark, verdict }) {
  if (benchmark !== "" && card.dataset.benchmark !== benchmark) return false;
  const answers = [...card.querySelectorAll("[data-run]")];
  const own = answers.filter((answer) => run === "" || answer.dataset.run === run);
  if (verdict !== "disagree") return own.some((each) => verdict === "" || each.dataset.verdict === verdict);
  const said = (verdict) => answers.some((answer) => answer.dataset.verdict === verdict);
  return own.length > 0 && said("right") && said("wrong");
}

function total({ run, benchmark, verdict }) {
  let sum = 0;
  for (const [name, runs] of Object.entries(totals)) {
    if (benchmark === "" || name === benchmark) sum += runs[run]?.[verdict] ?? 0;
  }
  return sum;
}

function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  for (const answer of document.querySelectorAll("article [data-run]")) {
    answer.hidden = wanted.verdict !== "disagree" && wanted.run !== "" && answer.dataset.run !== wanted.run;
  }
  const found = cards.filter((card) => matches(card, wanted));
  const shown = new Set(found.slice(0, most));
  for (const card of cards) card.hidden = !shown.has(card);
  const kind = { right: "questions answered right", wrong: "questions answered wrong", disagree: "questions that runs disagree about" };
  document.querySelector("#count").textContent =
    `${found.length} of ${total(wanted)} ${kind[wanted.verdict] ?? "questions"} sampled` +
    (shown.size < found.length ? `, the first ${shown.size} shown` : "");
  more.hidden = shown.size === found.length;
}

function step(event) {
  const by = { j: 1, k: -1 }[event.key];
  if (!by || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const shown = cards.filter((card) => !card.hidden);
  const now = shown.indexOf(document.activeElement.closest("article"));
  const next = shown[now < 0 ? 0 : Math.min(Math.max(now + by, 0), shown.length - 1)];
  if (next) next.focus();
}

if (form) {
  form.addEventListener("input", () => { most = AT_ONCE; filter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { most += 2 * AT_ONCE; filter(); });
  document.addEventListener("keydown", step);
  filter();
}
// A phone shows first what is short; paper shows what is folded on the screen.
const folds = [...document.querySelectorAll("details")];
if (matchMedia("(max-width: 40rem)").matches) for (const each of folds) each.open = false;
addEventListener("beforeprint", () => { for (const each of folds) each.open = true; });
