// What happens: typing, choosing a token, trying a fact. Without a server it shows the text that is in the file.
"use strict";

(() => {
  const { el, put } = Draw;
  const id = (name) => document.getElementById(name);
  const held = id("data") && JSON.parse(id("data").textContent);
  const token = new URLSearchParams(location.search).get("token") || "";
  const MOST_CHARACTERS = 100000;
  const WAIT = 250; // ms after the last keystroke
  const state = { about: null, look: null, position: 0, compare: "first", asked: null, timer: null,
    tried: null, asking: 0 };

  // Asking.
  async function ask(what, given, options = {}) {
    document.body.dataset.asking = ++state.asking;
    try {
      return await answer(what, given, options);
    } finally {
      document.body.dataset.asking = --state.asking;
    }
  }

  async function answer(what, given, options) {
    const response = await fetch(`api/${what}?token=${encodeURIComponent(token)}${options.query || ""}`, {
      method: "POST", headers: { "content-type": options.type || "application/json" },
      body: options.type ? given : JSON.stringify(given), signal: options.signal });
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    let last = null;
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const lines = rest.split("\n");
      rest = lines.pop();
      if (done && rest) lines.push(rest);
      for (const line of lines) {
        const told = JSON.parse(line);
        if (told.progress) progress(told.progress);
        else last = told;
      }
      if (done) break;
    }
    if (!last || last.error) throw new Error(last ? last.error : "The server ended before it answered.");
    return last.result;
  }

  function progress(told) {
    const bar = id("progress");
    bar.hidden = told === null;
    if (told === null) { say(""); return; }
    const [done, total, what] = told;
    bar.setAttribute("aria-valuemin", 0);
    bar.setAttribute("aria-valuemax", total);
    bar.setAttribute("aria-valuenow", done);
    put(bar, Draw.bar(total ? done / total : 0));
    say(`${done} of ${total}: ${what}`);
  }

  const say = (text) => { id("status").textContent = text; };

  // A reading that ends well takes back what a reading complained of, not why a patch was refused.
  function complain(error, from = "work") {
    const problem = id("problem");
    if (!error && from === "reading" && problem.dataset.from !== from) return;
    problem.dataset.from = from;
    problem.hidden = !error;
    problem.textContent = error ? error.message : "";
  }

  // Long work: one at a time, with everything that would start another one switched off.
  async function work(act) {
    const buttons = [...document.querySelectorAll("#facts button, #export, #load")];
    for (const button of buttons) button.disabled = true;
    const ticking = setTimeout(() => { if (id("progress").hidden) say("Working …"); }, 400);
    complain(null);
    try {
      return await act();
    } catch (error) {
      complain(error);
      return null;
    } finally {
      clearTimeout(ticking);
      progress(null);
      for (const button of buttons) button.disabled = false;
    }
  }

  // The text.
  function keep() {
    try { sessionStorage.setItem("text", id("text").value); } catch { /* a private window may refuse */ }
  }

  function typed() {
    keep();
    clearTimeout(state.timer);
    state.timer = setTimeout(look, WAIT);
    id("strip").classList.add("stale");
  }

  async function look() {
    if (state.asked) state.asked.abort();
    const asked = state.asked = new AbortController();
    const text = id("text").value;
    const slow = setTimeout(() => say("The model is reading …"), 500);
    try {
      if (text.length > MOST_CHARACTERS) {
        throw new Error(`The text has ${Draw.whole(text.length)} characters; allowed: ${Draw.whole(MOST_CHARACTERS)}.`);
      }
      const seen = await ask("look", { text, compare: state.compare }, { signal: asked.signal });
      complain(null, "reading");
      const isLonger = !state.look || seen.tokens.length !== state.look.tokens.length;
      const position = isLonger ? seen.tokens.length - 1 : Math.min(state.position, seen.tokens.length - 1);
      show(seen, position);
      await choose(position, false);
    } catch (error) {
      if (error.name !== "AbortError") complain(error, "reading");
    } finally {
      clearTimeout(slow);
      if (state.asked === asked) { state.asked = null; say(""); }
    }
  }

  function show(seen, position) {
    Object.assign(state, { look: seen, position });
    Draw.strip(seen, position, choose);
    Draw.legend(seen);
    Draw.traffic(seen);
    put("notes", seen.notes.map((note) => el("li", {}, note)));
    id("strip").classList.remove("stale");
    const names = { memory: "no memory", patches: "no patches", both: "neither" };
    id("comparing").hidden = Boolean(held) || seen.comparisons.length < 2;
    put("compare", seen.comparisons.map((one) => el("option", { value: one }, names[one])));
    id("compare").value = seen.compare || "";
  }

  // A token.
  async function choose(position, focus = true) {
    state.position = position;
    for (const button of id("strip").querySelectorAll(".token")) {
      const isIt = Number(button.dataset.index) === position;
      button.setAttribute("aria-pressed", String(isIt));
      button.tabIndex = isIt ? 0 : -1;
      if (isIt && focus) button.focus();
    }
    if (held) { Draw.token(state.look, held.look.details[position], state.about); return; }
    const { look: seen } = state;
    try {
      const told = await ask("token", { text: seen.text, compare: seen.compare || "first", position });
      if (told.version !== seen.version) { await look(); return; }
      if (state.position === position && state.look === seen) Draw.token(seen, told, state.about);
    } catch (error) { complain(error, "reading"); }
  }

  function move(event) {
    const last = state.look ? state.look.tokens.length - 1 : -1;
    const forward = getComputedStyle(id("strip")).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const back = forward === "ArrowLeft" ? "ArrowRight" : "ArrowLeft";
    const to = { [forward]: state.position + 1, [back]: state.position - 1, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (to >= 0 && to <= last) choose(to);
  }

  // Facts and patches.
  function learned(about) {
    state.about = about;
    if (!about.patches.some((one) => one.name === state.tried)) { state.tried = null; put("tried"); }
    Edit.patches(about, held ? null : act, state.tried);
  }

  const lines = (name) => id(name).value.split("\n").map((line) => line.trim()).filter(Boolean);

  async function tryFact(event) {
    event.preventDefault();
    const given = { paraphrases: lines("paraphrases"), keep: lines("keep") };
    for (const name of ["subject", "prompt", "object"]) given[name] = id(name).value;
    await work(async () => {
      const told = await ask("learn", given);
      state.tried = told.name;
      put("tried", el("h3", {}, `Before and after ${told.name}`), Edit.tried(told.tried));
      learned(await ask("about", {}));
    });
  }

  function download(name, type, data) {
    const link = el("a", { href: URL.createObjectURL(new Blob([data], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  const act = (what, name) => work(async () => {
    if (what === "save") {
      const { base64 } = await ask("save", {}, { query: `&name=${encodeURIComponent(name)}` });
      download(`${name}.safetensors`, "application/octet-stream", Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)));
      return;
    }
    learned(await ask(what, { name }));
    if (what !== "forget") { state.compare = what === "apply" ? "patches" : "first"; await look(); }
    const again = document.querySelector(`[data-patch="${CSS.escape(name)}"] button`);
    if (again) setTimeout(() => again.focus());
  });

  async function load(event) {
    const file = event.target.files[0];
    if (!file) return;
    await work(async () => {
      const told = await ask("load", await file.arrayBuffer(), { type: "application/octet-stream" });
      learned(told.about);
    });
    event.target.value = "";
  }

  async function compare(event) {
    event.preventDefault();
    const [one, other] = [id("one").value, id("other").value];
    await work(async () => Edit.compared(await ask("compare", { one, other }), one, other));
  }

  const save = () => work(async () => {
    const page = await ask("export", { text: state.look.text, compare: state.look.compare || "first" });
    download("explored.html", "text/html", page);
  });

  // The theme.
  function theme(event) {
    const isDark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" :
      matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
    try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* as above */ }
  }

  async function begin() {
    try {
      const kept = localStorage.getItem("theme");
      if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
    } catch { /* as above */ }
    id("theme").addEventListener("click", theme);
    id("strip").addEventListener("keydown", move);
    if (held) {
      document.body.classList.add("exported");
      Draw.about(held.about);
      learned(held.about);
      show(held.look, held.look.tokens.length - 1);
      await choose(held.look.tokens.length - 1, false);
      document.body.dataset.ready = "yes";
      return;
    }
    id("text").addEventListener("input", typed);
    id("compare").addEventListener("change", (event) => { state.compare = event.target.value; look(); });
    id("fact").addEventListener("submit", tryFact);
    id("comparison").addEventListener("submit", compare);
    id("load").addEventListener("change", load);
    id("export").addEventListener("click", save);
    try {
      const about = await ask("about", {});
      Draw.about(about);
      learned(about);
      let text = null;
      try { text = sessionStorage.getItem("text"); } catch { /* as above */ }
      const fact = about.patches.flatMap((one) => one.facts)[0];
      id("text").value = text || (fact ? fact.prompt : "The capital of France is");
      await look();
    } catch (error) { complain(error); }
    document.body.dataset.ready = "yes";
  }

  begin();
})();
