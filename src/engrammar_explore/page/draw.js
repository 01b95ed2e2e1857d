// What is drawn: everything is made of elements and text, never of markup.
"use strict";

const Draw = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
    return node;
  }

  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  function put(place, ...children) {
    (typeof place === "string" ? document.getElementById(place) : place).replaceChildren(...children.flat());
  }

  // Numbers.
  const share = (p) => p >= 0.9995 ? "100 %" : p >= 0.0005 ? `${(100 * p).toFixed(1)} %` : p > 0 ? "<0.1 %" : "0 %";
  const signed = (p) => Math.abs(p) < 0.0005 ? "0.0" : `${p > 0 ? "+" : "−"}${(100 * Math.abs(p)).toFixed(1)}`;
  const short = (x) => x === 0 ? "0" : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") :
    Math.abs(x) >= 0.01 ? x.toPrecision(3) : x.toExponential(1);
  const whole = (x) => x.toLocaleString("en");

  // A token's text as a person can see it.
  function visible(text) {
    return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "∅";
  }

  const word = (text) => el("span", { class: "word", dir: "auto" }, visible(text).replace(/^ /, "␣").replace(/ $/, "␣"));

  function bar(value, kind = "bar", label = null) {
    const width = Math.max(0, Math.min(1, value)) * 100;
    return svg("svg", { viewBox: "0 0 100 8", height: 8, preserveAspectRatio: "none",
      role: label ? "img" : null, "aria-label": label, "aria-hidden": label ? null : "true" },
    svg("rect", { class: "bar-back", width: 100, height: 8, rx: 1 }),
    svg("rect", { class: kind, width, height: 8, rx: 1 }));
  }

  // Rows are memory layers, cells are branches; below them, how much the next guess changes.
  function cells(look, index, mostChange) {
    const rows = look.memories.map((memory) => memory.gates[index]);
    const change = look.tokens[index].change;
    const height = 6 * rows.length + (change === undefined ? 0 : 4);
    const drawn = rows.flatMap((gates, row) => gates.flatMap((gate, column) => {
      const width = 100 / gates.length;
      const box = { x: column * width + 0.5, y: 6 * row, width: Math.max(1, width - 1), height: 5 };
      return [svg("rect", { class: "cell-back", ...box }), svg("rect", { class: "cell", "fill-opacity": gate, ...box })];
    }));
    if (change !== undefined) {
      const width = mostChange > 0 ? 100 * Math.min(1, change / mostChange) : 0;
      drawn.push(svg("rect", { class: "change", x: 0.5, y: 6 * rows.length + 1, width, height: 2.5 }));
    }
    return svg("svg", { viewBox: `0 0 100 ${Math.max(1, height)}`, height: Math.max(1, height), preserveAspectRatio: "none",
      "aria-hidden": "true" }, drawn);
  }

  function spoken(look, index) {
    const token = look.tokens[index];
    const gates = look.memories.map((memory) => memory.gates[index]).flat();
    const mean = gates.length ? `, mean gate ${(gates.reduce((a, b) => a + b, 0) / gates.length).toFixed(2)}` : "";
    const part = token.part ? `, part ${token.part + 1}` : "";
    return `${visible(token.text)}${part}${mean}${token.change > 1e-6 ? `, changes ${token.change.toFixed(3)} nats` : ""}`;
  }

  function strip(look, position, choose) {
    const most = Math.max(...look.tokens.map((token) => token.change || 0));
    const made = look.tokens.flatMap((token, index) => {
      const text = token.part ? "·" : visible(token.text);
      const pressed = index === position;
      const button = el("button", { type: "button", class: "token", "data-index": index, "aria-pressed": String(pressed),
        tabindex: pressed ? 0 : -1, "aria-label": spoken(look, index), title: spoken(look, index),
        on: { click: () => choose(index) } },
      el("span", { class: token.part || /^[\n\t\r]/.test(token.text) ? "mark" : null }, text), cells(look, index, most));
      return token.text.endsWith("\n") ? [button, el("span", { class: "break" })] : [button];
    });
    put("strip", made);
  }

  function guesses(told, compare) {
    const both = told.guesses.length && told.guesses[0].without !== undefined;
    const most = Math.max(...told.guesses.map((one) => Math.max(one.with, one.without || 0)), 1e-9);
    const line = (one, isNext) => el("tr", { class: isNext ? "next" : null },
      el("td", {}, word(one.text)),
      el("td", { class: "bars" }, bar(one.with / most), both ? bar(one.without / most, "bar-other") : null),
      el("td", { class: "n" }, share(one.with)),
      both ? el("td", { class: "n" }, share(one.without)) : null,
      both ? el("td", { class: "n" }, signed(one.with - one.without)) : null);
    const rows = told.guesses.map((one) => line(one, told.next && one.id === told.next.id));
    if (told.next && !told.guesses.some((one) => one.id === told.next.id)) rows.push(line(told.next, true));
    const name = { memory: "no memory", patches: "no patch", both: "neither" }[compare];
    return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Next tokens" }, el("table", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Next token"), el("td", { class: "bars" }),
        el("th", { scope: "col", class: "n" }, "as it is"),
        both ? el("th", { scope: "col", class: "n" }, name) : null,
        both ? el("th", { scope: "col", class: "n" }, "difference") : null)),
      el("tbody", {}, rows)));
  }

  const chips = (tokens) => el("ul", { class: "chips" }, tokens.map((one) =>
    el("li", {}, word(one.text), " ", el("span", { class: "number" }, one.score.toFixed(1)))));

  function sharing(shared) {
    if (!shared || !shared.num) return null;
    const list = (ones) => ones.map((one) => `“${visible(one.text)}” ${whole(one.count)}×`).join(", ");
    const names = el("details", { class: "shared" }, el("summary", {}, `${whole(shared.num)} others read this row`),
      el("p", {}, "Most frequent: ", list(shared.often)), el("p", {}, "Nearest by name: ", list(shared.near)));
    return names;
  }

  function order(one, census, value) {
    const words = el("span", { class: "word", dir: "auto" }, visible(one.words.join("")).trim() || "∅");
    const count = one.count === null || one.count === undefined ? "" : ` · ${whole(one.count)}× in the corpus`;
    const begins = one.whole ? "" : " · the text begins here, so something is missing";
    const part = value > 0 ? ` · ${(100 * one.share).toFixed(0)} % of the value` : "";
    const most = Math.max(...one.rows.map((row) => row.norm), 1e-9);
    return el("div", { class: "order" },
      el("p", {}, words, el("span", { class: "quiet" }, ` ${one.order}-gram${count}${part}${begins}`)),
      el("table", {},
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Head"), el("th", { scope: "col", class: "n" }, "Row"),
          el("td", { class: "bars" }), el("th", { scope: "col", class: "n" }, "Norm"))),
        el("tbody", {}, one.rows.flatMap((row) => [
          el("tr", {}, el("td", {}, String(row.head)), el("td", { class: "n" }, whole(row.row)),
            el("td", { class: "bars" }, bar(row.norm / most)), el("td", { class: "n" }, short(row.norm))),
          row.shared && row.shared.num ? el("tr", {}, el("td", { colspan: 4 }, sharing(row.shared))) : null]))));
  }

  function memory(one, isOnly, census) {
    const title = `Block ${one.layer}${isOnly ? "" : ` · ${one.name}`}`;
    const gates = el("div", { class: "gates" }, one.gates.map((gate, branch) => el("span", { class: "number" },
      bar(gate, "bar", `gate ${gate.toFixed(3)}`), gate.toFixed(3),
      one.gates.length > 1 ? el("span", { class: "quiet" }, ` branch ${branch}`) : null)));
    const hint = el("p", { class: "quiet hint" }, "The final norm and the output head applied to the value alone; logits.");
    const said = one.silent ? [el("p", { class: "quiet" }, "The memory is silent here.")] : one.value === 0 ?
      [el("p", { class: "quiet" }, "The value is zero: nothing is promoted.")] :
      [el("h4", {}, "The value promotes"), hint, chips(one.promotes), el("h4", {}, "and holds back"), chips(one.demotes)];
    return [el("h3", {}, title), el("dl", { class: "facts" }, el("dt", {}, "Gate"), el("dd", {}, gates),
      el("dt", {}, "Value, norm"), el("dd", {}, short(one.value)), el("dt", {}, "Added, norm"), el("dd", {}, short(one.added))),
    ...said, ...one.orders.map((each) => order(each, census, one.value))];
  }

  function token(look, told, about) {
    const one = look.tokens[told.position];
    document.getElementById("token-title").replaceChildren(word(one.text),
      el("span", { class: "quiet" }, `  token ${told.position + 1} of ${look.tokens.length}, id ${whole(one.id)}`));
    const isOnly = new Set(told.memories.map((each) => each.name)).size < 2;
    put("token-body", guesses(told, look.compare),
      el("p", { class: "quiet" }, told.next ? "The token that follows in the text is tinted." : "The text ends here."),
      ...told.memories.flatMap((each) => memory(each, isOnly, about.census)));
  }

  function about(told) {
    const names = told.memories.map((one) =>
      `block ${one.layer}: ${one.orders.join("- and ")}-grams, ${one.heads} heads, ${whole(one.rows)} rows of ${one.width}`);
    const census = told.census ? [`census of ${told.census.corpus}, ${whole(told.census.tokens)} tokens`] : [];
    const lines = [`${told.class}, ${told.blocks} blocks of width ${told.hidden}`, ...names.slice(0, 3),
      ...(names.length > 3 ? [`${names.length - 3} more memory layers`] : []),
      ...(names.length ? [] : ["no memory"]), ...census];
    put("title", told.title);
    put("about", lines.join(" · "));
    document.title = `${told.title} · engrammar explorer`;
  }

  function legend(look) {
    const swatch = (kind, opacity) => svg("svg", { width: 14, height: 8, "aria-hidden": "true" },
      svg("rect", { class: kind, width: 14, height: 8, "fill-opacity": opacity }));
    const parts = [];
    if (look.memories.length) {
      parts.push(el("span", {}, swatch("cell-back", 1), "gate 0"), el("span", {}, swatch("cell", 1),
        `gate 1${look.memories.length > 1 ? `, a row per block (${look.memories.map((one) => one.layer).join(", ")})` : ""}` +
        `${look.memories[0].gates[0].length > 1 ? ", a cell per branch" : ""}`));
    }
    if (look.compare) parts.push(el("span", {}, swatch("change", 1), "change of the next guess"));
    put("legend", parts);
  }

  function traffic(look) {
    const rows = look.traffic.map((one) => el("tr", {}, el("td", {}, `block ${one.layer}`), el("td", {}, one.tier),
      el("td", { class: "n" }, whole(one.rows)),
      el("td", { class: "n" }, one.hits === undefined ? "–" : `${whole(one.hits)} of ${whole(one.hits + one.misses)}`),
      el("td", { class: "n" }, one.microseconds.toFixed(0))));
    const times = Object.entries(look.milliseconds).map(([name, ms]) =>
      `${name === "with" ? "the pass" : "the pass to compare with"} ${ms.toFixed(0)} ms`);
    put("traffic-body", rows.length ? el("table", {}, el("thead", {}, el("tr", {}, ["Memory", "Rows from", "Rows read",
      "Cache hits", "µs waited"].map((name, at) => el("th", { scope: "col", class: at > 1 ? "n" : null }, name)))),
    el("tbody", {}, rows)) : "", el("p", { class: "quiet" }, times.join(", "), "."));
  }

  return { el, put, share, short, whole, word, visible, bar, strip, token, about, legend, traffic };
})();
