// Run at the end of a page of benchmarks.report in an iframe: measures how it is laid out, tries its filter, and leaves
// what it found in the page around it.
"use strict";
addEventListener("load", () => {
  const box = (element) => element.getBoundingClientRect();
  const seen = (element) => box(element).width > 0 && box(element).height > 0;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)].filter(seen);
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const told = (element) => element.textContent.trim().slice(0, 60);

  function pairs(elements) {
    return elements.flatMap((a, i) =>
      elements.slice(i + 1).filter((b) => meet(box(a), box(b))).map((b) => `${told(a)} | ${told(b)}`));
  }

  const overlaps = all("svg").flatMap((svg) => pairs(all("text", svg)));
  const crossed = all("ul.bars li").flatMap((row) => pairs([...row.children].filter(seen)));
  const outside = all("svg text").filter((text) => {
    const [inner, outer] = [box(text), box(text.closest("svg"))];
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1;
  }).map(told);
  const clipped = all("h1, h2, h3, th, td, dd, dt, label, figcaption, li > span")
    .filter((element) => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0).map(told);
  const small = all("svg text").filter((text) => box(text).height < 9).map(told);

  const form = document.querySelector("form.filter");
  const rows = () => all("tr.row");
  function filtered(values) {
    form.reset();
    for (const [name, value] of Object.entries(values)) form.elements[name].value = value;
    form.dispatchEvent(new Event("input", { bubbles: true }));
    const wrong = rows().filter((row) =>
      (values.dtype && row.dataset.dtype && row.dataset.dtype !== values.dtype) ||
      (values.architecture && row.dataset.architecture && row.dataset.architecture !== values.architecture) ||
      (values.words || "").split(" ").some((word) => !row.textContent.toLowerCase().includes(word)));
    const counted = all("section").map((section) => [section.id, all(".row", section).length]);
    return {
      shown: rows().length, wrong: wrong.length, points: all("svg.roofline g.row").length, bars: all("li.row").length,
      said: form.querySelector("output").value, none: all("p.none").length, sections: Object.fromEntries(counted),
    };
  }

  const facts = {
    inner: innerWidth, scroll: document.documentElement.scrollWidth,
    headings: all("h1, h2, h3").length, tables: all("table").length, drawings: all("svg.roofline").length,
    overlaps, crossed, outside, clipped, small,
    wide: all(".scroll").filter((element) => box(element).right > innerWidth + 1).length,
    unscoped: all("th:not([scope])").length,
    unnamed: all("svg:not([aria-hidden])").filter((svg) => !svg.querySelector("title")).length,
    ids: [...document.querySelectorAll("[id]")].map((element) => element.id),
    filters: {
      nothing: filtered({}), words: filtered({ words: "gelu float32" }), dtype: filtered({ dtype: "bfloat16" }),
      architecture: filtered({ architecture: "sm_90" }), section: filtered({ section: "parity" }),
      unknown: filtered({ words: "no such op" }), again: filtered({}),
    },
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    errors: window.foundErrors,
  };
  const output = parent.document.createElement("pre");
  output.id = frameElement.id;
  output.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(facts))));
  parent.document.body.append(output);
});
