// MathML Core draws no mathvariant="script": give \mathcal letters their own characters.
addEventListener("load", () => {
  const odd = {B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ"};
  for (const mi of document.querySelectorAll('mi[mathvariant="script"]')) {
    mi.textContent = [...mi.textContent].map(c => odd[c] ?? (c >= "A" && c <= "Z" ? String.fromCodePoint(0x1D49C + c.charCodeAt(0) - 65) : c)).join("");
    mi.removeAttribute("mathvariant");
  }
  // the theme's arrows in the table of contents have no name for those who cannot see them
  for (const s of document.querySelectorAll("summary:has(.toctree-toggle)")) s.setAttribute("aria-label", "pages of this section");
  // a signature's parameters, a line each, are no list of definitions
  for (const e of document.querySelectorAll("dt.sig dl, dt.sig dl > dd")) e.setAttribute("role", "presentation");
  // docutils gives references a role that browsers no longer know
  for (const e of document.querySelectorAll('[role="doc-biblioentry"]')) e.setAttribute("role", "listitem");
});
