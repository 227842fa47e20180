"use strict";
// Without this script every card is there; it only hides.
const form = document.querySelector("#filters");
const cards = [...document.querySelectorAll("article")];

function filter() {
  const { run, benchmark, verdict } = Object.fromEntries(new FormData(form));
  for (const card of cards) {
    let wanted = false;
    for (const answer of card.querySelectorAll("[data-run]")) {
      answer.hidden = run !== "" && answer.dataset.run !== run;
      wanted ||= !answer.hidden && (verdict === "" || answer.dataset.verdict === verdict);
    }
    card.hidden = !wanted || (benchmark !== "" && card.dataset.benchmark !== benchmark);
  }
  const shown = cards.filter((card) => !card.hidden).length;
  document.querySelector("#count").textContent = `${shown} of ${cards.length} questions`;
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
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", step);
  filter();
}
