"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("script");

  // The header may take several lines. Sticky elements and the targets of links need its height.
  const top = document.querySelector(".top");
  new ResizeObserver(() => root.style.setProperty("--top", `${top.offsetHeight}px`)).observe(top);

  // Theme: the system's theme until the reader presses the button; then the reader's choice, if the browser stores it.
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  const stored = () => { try { return localStorage.getItem("crate-jax-theme"); } catch { return null; } };
  const store = (theme) => { try { localStorage.setItem("crate-jax-theme", theme); } catch { /* not allowed */ } };
  const show = (theme) => {
    if (theme === "system") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  let theme = themes.includes(stored()) ? stored() : "system";
  show(theme);
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    store(theme);
    show(theme);
  });

  // Sorting: data-number holds a cell's number in full precision; empty cells stay at the end.
  const compare = (a, b) => {
    const [x, y] = [a.dataset.number, b.dataset.number];
    if (x !== undefined && y !== undefined) return Number(x) - Number(y);
    if (x !== undefined || y !== undefined) return x !== undefined ? -1 : 1;
    return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((r, s) => {
        const [a, b] = [r.cells[column], s.cells[column]];
        const [noA, noB] = ["empty" in a.dataset, "empty" in b.dataset];
        if (noA || noB) return noA - noB;
        return down ? compare(b, a) : compare(a, b);
      });
      table.tBodies[0].append(...rows);
    }));
  }

  // Comparison: a button shows or hides the parts of one run, which carry the run's number.
  for (const chip of document.querySelectorAll(".runs button")) {
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", on);
      document.querySelectorAll(`[data-run="${chip.value}"]`).forEach((part) => part.classList.toggle("off", !on));
    });
  }

  // A folded section opens when the reader follows a link to it, and for print.
  const unfold = () => {
    const aim = location.hash && document.getElementById(location.hash.slice(1));
    const folded = aim && aim.querySelector(":scope > details");
    if (folded) folded.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
  document.querySelectorAll(".contents a").forEach((a) => a.addEventListener("click", () => setTimeout(unfold)));
  addEventListener("beforeprint", () => document.querySelectorAll("main details").forEach((d) => { d.open = true; }));

  // Contents: closed on a small screen; the link to the section that the reader sees is marked.
  const contents = document.querySelector(".contents details");
  if (contents && matchMedia("(max-width: 60rem)").matches) contents.open = false;
  const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
  const visible = new Set();
  const watch = new IntersectionObserver((entries) => {
    entries.forEach((e) => (e.isIntersecting ? visible.add(e.target.id) : visible.delete(e.target.id)));
    const now = [...links.keys()].find((id) => visible.has(id));
    links.forEach((a, id) => (id === now ? a.setAttribute("aria-current", "true") : a.removeAttribute("aria-current")));
  }, { rootMargin: "-10% 0px -50% 0px" });
  document.querySelectorAll("main > section").forEach((s) => watch.observe(s));
})();
