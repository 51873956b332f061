// Appended to the script of each page by build_docs.py: ranks search results, and scrolls the sidebar to the page.

// A query finds the sections that have all its words. A word counts more in a title than in the text, more as a whole
// word than as the start of one, and more on the pages that come first in the sidebar (`rank`, from 1 to 4).
const kdWords = { unlabelled: "unlabeled", labelled: "labeled", colour: "color", normalisation: "normalization",
  "pre-trained": "pretrained", huggingface: "hugging face", photo: "image", photos: "images",
  quickstart: "install", quick: "install", start: "install" };
const kdSkip = new Set("a an and are can do does for from how i in is it my of on or own the to what which why with".split(" "));
const kdCount = (text, word, whole) => {
  const safe = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return (text.match(new RegExp("(?<![\\w])" + safe + (whole ? "s?(?![\\w])" : ""), "gi")) || []).length;
};
const kdWordScore = (entry, word) => {
  const where = [[entry.title, 30], [entry.section, 25], [entry.text, 2]];
  return where.reduce((sum, [text, weight]) => {
    const whole = kdCount(text, word, true), start = kdCount(text, word, false);
    return sum + weight * (whole ? 1 + Math.min(whole, 6) / 6 : start ? 0.5 : 0);
  }, 0);
};
window.kdSearch = (index, query, limit) => {
  const asked = query.toLowerCase().trim();
  const words = asked.split(/\s+/).map((w) => kdWords[w] || w).join(" ").split(" ").filter((w) => w && !kdSkip.has(w));
  if (!words.length) return [];
  const score = (e) => {
    const scores = words.map((w) => kdWordScore(e, w));
    if (scores.some((s) => !s)) return 0;
    const name = (e.section || e.title).toLowerCase();
    const exact = name === words.join(" ") ? 200 : name.includes(words.join(" ")) ? 20 : 0;
    return (scores.reduce((a, b) => a + b, 0) / words.length + exact) * (5 - e.rank) / 4;
  };
  return index.map((e) => [score(e), e]).filter(([s]) => s).sort((a, b) => b[0] - a[0]).slice(0, limit).map(([, e]) => e);
};

document.addEventListener("DOMContentLoaded", () => {
  const bar = document.querySelector("#quarto-sidebar");
  let here = bar?.querySelector("a.sidebar-link.active");
  if (bar && !here && (here = bar.querySelector('a[href="a_z.html"]'))) {   // the page of a loss
    here.classList.add("active");
    here.setAttribute("aria-current", "true");
    for (let e = here; (e = e.parentElement.closest("ul.collapse")); ) e.classList.add("show");
  }
  if (here && bar) bar.scrollTop = here.getBoundingClientRect().top - bar.getBoundingClientRect().top - bar.clientHeight / 2;
});

// Progress tables scroll on a narrow screen; other printed output wraps, and so does a value of one line.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".cell-output-display pre:not(.sourceCode) > code").forEach((e) => {
    if (!e.textContent.trim().includes("\n")) e.style.whiteSpace = "pre-wrap";
  });
  document.querySelectorAll(".cell-output-stdout pre").forEach((e) => {
    if (innerWidth < 768 && /^epoch\s/.test(e.textContent)) { e.style.overflowX = "auto"; e.querySelector("code").style.whiteSpace = "pre"; }
  });
});

// On a phone a wide figure keeps letters of a legible size, and scrolls.
const kdWiden = () => document.querySelectorAll("main img").forEach((e) => {
  const width = e.naturalWidth * 0.34;   // stored at 200 dots per inch: 10 points are 10 pixels high
  if (innerWidth < 768 && width > e.clientWidth * 1.1) {
    Object.assign(e.parentElement.style, { overflowX: "auto", maxWidth: e.clientWidth + "px" });
    Object.assign(e.style, { width: width + "px", maxWidth: "none" });
  }
});
// What scrolls sideways fades out at the side where it goes on.
const kdFade = () => document.querySelectorAll("main pre, main pre > code, main table, main img, main .katex-display").forEach((e) => {
  while (e && !/auto|scroll/.test(getComputedStyle(e).overflowX)) e = e.matches("main") ? null : e.parentElement;
  if (!e || e.matches("main")) return;
  const mark = () => e.classList.toggle("kd-more", e.scrollWidth - e.clientWidth - e.scrollLeft > 2);
  e.onscroll = mark;
  mark();
});
addEventListener("load", () => { kdWiden(); kdFade(); addEventListener("resize", kdFade); });
