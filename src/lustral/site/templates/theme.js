"use strict";
// Light or dark: what the reader chose before, or else what the system says. Runs before the page is painted.
(() => {
  const KEY = "lustral-theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");

  function remembered() {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null; // storage can be switched off
    }
  }

  function remember(theme) {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // then it holds for this page
    }
  }

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const chosen = remembered();
  if (chosen === "light" || chosen === "dark") {
    root.dataset.theme = chosen;
  }

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      remember(root.dataset.theme);
      show();
    });
    system.addEventListener("change", show);
    show();

    for (const copy of document.querySelectorAll("button[data-copy]")) {
      copy.hidden = false;
      copy.addEventListener("click", () => copyText(document.getElementById(copy.dataset.copy), copy));
    }
  });

  async function copyText(source, button) {
    const label = button.textContent;
    let done = false;
    try {
      await navigator.clipboard.writeText(source.textContent);
      done = true;
    } catch {
      getSelection().selectAllChildren(source); // no clipboard on some file:// pages: select it, and try the old way
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
    setTimeout(() => { button.textContent = label; }, 2000);
  }
})();
