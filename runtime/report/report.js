"use strict";
// Three small things: the theme button, the before/after sliders, and copying the commands.
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  label();

  for (const box of document.querySelectorAll("[data-compare]")) {
    const stage = box.querySelector(".stage.views");
    const heat = box.querySelector(".stage.heat");
    const range = stage.querySelector("input");
    const [one, two] = box.querySelectorAll("select");
    const show = (where, key, kind) => {
      for (const image of where.querySelectorAll("img")) image.classList.toggle(kind, image.dataset.key === key);
    };
    const update = () => {
      stage.style.setProperty("--cut", range.value + "%");
      show(stage, one.value, "shown");
      show(stage, two.value, "over");
      stage.querySelector(".tag.one").textContent = one.selectedOptions[0].text;
      stage.querySelector(".tag.two").textContent = two.selectedOptions[0].text;
      const engine = [...heat.querySelectorAll("img")].find((image) => image.dataset.key === two.value);
      if (engine) {
        show(heat, two.value, "shown");
        box.querySelector(".heat-words").textContent = engine.alt;
        box.querySelector(".heat-peak").textContent = engine.dataset.peak;
      }
    };
    for (const control of [range, one, two]) control.addEventListener("input", update);
    update();
  }

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = "Copied";
    });
  }
})();
