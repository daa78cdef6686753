// Filters the rows of all tables and drawings. A row that has no architecture, say, is not asked for one.
"use strict";
(() => {
  const form = document.querySelector("form.filter");
  const rows = [...document.querySelectorAll(".row")];
  const sections = [...document.querySelectorAll("section")];
  const output = form.querySelector("output");
  const text = (row) => (row.dataset.text || row.textContent).toLowerCase();
  const counted = rows.filter((row) => row.tagName === "TR");

  function apply() {
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = ["dtype", "backend", "architecture"].map((name) => [name, form.elements[name]?.value]);
    for (const row of rows) {
      const fits = chosen.every(([name, value]) => !value || !row.dataset[name] || row.dataset[name] === value);
      row.toggleAttribute("hidden", !(fits && words.every((word) => text(row).includes(word))));
    }
    for (const section of sections) {
      section.hidden = Boolean(form.elements.section.value) && section.id !== form.elements.section.value;
    }
    for (const group of document.querySelectorAll(".group")) {
      const left = [...group.querySelectorAll(".row")].some((row) => !row.hasAttribute("hidden"));
      group.querySelector(".none").hidden = left;
    }
    const shown = counted.filter((row) => !row.hasAttribute("hidden") && !row.closest("section").hidden).length;
    output.value = `${shown} of ${counted.length} rows`;
  }

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
})();
