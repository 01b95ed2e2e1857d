// Facts and patches: what was tried, what is applied, and how two patches differ.
"use strict";

const Edit = (() => {
  const { el, put, share, whole, word } = Draw;

  const mark = (holds, yes, no) => el("span", { class: holds ? "right" : "quiet" }, holds ? yes : no);
  const said = (text) => el("span", { dir: "auto" }, `“${Draw.visible(text.trim())}”`);
  const chance = (answer) => answer.probability === undefined ? "" : share(answer.probability);

  function questions(title, ones, isAsked) {
    if (!ones.length) return [];
    const reached = ones.filter((one) => one.reaches).length;
    const answered = ones.filter((one) => one.answered).length;
    const count = isAsked ? `${answered} of ${ones.length} answered, ${reached} reached` :
      `${ones.length - ones.filter((one) => one.before.greedy !== one.after.greedy).length} of ${ones.length} answers stay`;
    const rows = ones.map((one) => el("tr", {}, el("td", { dir: "auto" }, one.text), el("td", {}, said(one.before.greedy)),
      el("td", {}, said(one.after.greedy)), el("td", { class: "n" }, isAsked ? chance(one.after) : ""),
      el("td", {}, isAsked ? mark(one.answered, "answered", one.reaches ? "reached" : "not reached") :
        mark(one.before.greedy === one.after.greedy, one.reaches ? "stays" : "same to the bit", "changes"))));
    return [el("details", {}, el("summary", {}, `${title}: ${count}`),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, el("table", {}, el("thead", {},
        el("tr", {}, ["Prompt", "Before", "After", isAsked ? "Chance" : "", "Result"].map((name) =>
          name ? el("th", { scope: "col" }, name) : el("td")))), el("tbody", {}, rows))))];
  }

  function tried(told) {
    const { prompt, neutral } = told;
    const line = (name, answer) => [el("span", { class: "quiet" }, name), said(answer.greedy),
      el("span", { class: "number quiet" }, chance(answer))];
    const drift = neutral.changed === 0 ?
      `Neutral text: all ${neutral.tokens} tokens are the same to the bit.` :
      `Neutral text: ${neutral.changed} of ${neutral.tokens} tokens change, by ${Draw.short(neutral.mean)} nats on average.`;
    return [el("p", { dir: "auto" }, prompt.text, " … ", mark(prompt.answered, "answered", "not answered")),
      el("div", { class: "answer" }, line("before", prompt.before), line("after", prompt.after)),
      ...questions("Other ways to ask", told.phrasings, true),
      ...questions("Other questions about the subject", told.others, false),
      ...questions("Prompts that should not change", told.keep, false), el("p", { class: "quiet" }, drift)];
  }

  function patch(one, acts, shown) {
    const facts = one.facts.map((fact) => `${fact.prompt} ${fact.object}`);
    const act = (name, label) => el("button", { type: "button", class: "plain", "aria-label": `${label} ${one.name}`,
      on: { click: () => acts(name, one.name) } }, label);
    const size = `${whole(one.keys)} ${one.keys === 1 ? "key" : "keys"}${one.rows ? `, ${whole(one.rows)} rows` : ""}, ${whole(one.bytes)} bytes`;
    return el("li", { "data-patch": one.name },
      el("div", { class: "row" }, el("strong", {}, one.name),
        el("span", { class: one.applied ? "state on" : "state" }, one.applied ? "applied" : "not applied"),
        el("span", { class: "quiet" }, size),
        acts ? el("span", { class: "actions" }, one.applied ? act("undo", "Undo") : act("apply", "Apply"),
          act("save", "Save"), one.applied ? null : act("forget", "Forget")) : null),
      facts.length ? el("p", { class: "quiet", dir: "auto" }, facts.slice(0, 6).join(" · "),
        facts.length > 6 ? ` · and ${facts.length - 6} more` : "") : null,
      one.tried && one.name !== shown ? el("details", {}, el("summary", {}, "Before and after"), el("div", { class: "tried" }, tried(one.tried))) : null);
  }

  // `shown` is the patch whose trial stands above the list.
  function patches(about, acts, shown) {
    put("patches", about.patches.length ? about.patches.map((one) => patch(one, acts, shown)) :
      el("li", { class: "quiet" }, "None yet."));
    if (!acts) return;
    document.getElementById("comparison").hidden = about.patches.length < 2;
    const names = about.patches.map((each) => each.name);
    let taken = null; // two different ones, and what was chosen if it is still there
    for (const select of ["one", "other"].map((id) => document.getElementById(id))) {
      const before = select.value;
      put(select, names.map((name) => el("option", { value: name }, name)));
      select.value = names.includes(before) && before !== taken ? before : names.find((name) => name !== taken) || "";
      taken = select.value;
    }
  }

  function compared(told, one, other) {
    const facts = (list) => list.map((fact) => `${fact.prompt} ${fact.object}`).join(" · ") || "nothing in words";
    put("compared", el("dl", { class: "facts" },
      el("dt", {}, `Only ${one}`), el("dd", {}, `${whole(told.only_first)} places: ${facts(told.facts_only_first)}`),
      el("dt", {}, `Only ${other}`), el("dd", {}, `${whole(told.only_second)} places: ${facts(told.facts_only_second)}`),
      el("dt", {}, "In conflict"), el("dd", {}, told.changed ? `${whole(told.changed)} places, so they do not go together` :
        "nothing, so they go together"),
      told.same_base ? null : el("dt", {}, "Base"), told.same_base ? null : el("dd", {}, "They are for different models.")));
  }

  return { tried, patches, compared, word };
})();
