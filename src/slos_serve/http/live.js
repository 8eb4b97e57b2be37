"use strict";
const AGAIN_MS = 4000, SILENT_MS = 9000, MOST_BARS = 120, MOST_REQUESTS = 200;
const base = location.pathname.replace(/\/slo\/?$/, "/");
const given = JSON.parse(document.getElementById("data").textContent);  // a run that is over; null: a server is asked
const at = id => document.getElementById(id);
const buckets = new Map(), requests = new Map();
let isStreamed = true, key = given ? "" : sessionStorage.getItem("slo-key") || "", paused = false, seen = null, heardAt = 0, wake = () => {};

const isNumber = value => typeof value === "number" && isFinite(value);
const percent = (part, whole) => whole ? (100 * part / whole).toFixed(part === whole ? 0 : 1) + " %" : "–";
const share = value => isNumber(value) ? percent(value, 1) : "–";
const ms = value => isNumber(value) ? (Math.abs(value) < 10 ? value.toFixed(1) : Math.round(value)) + " ms" : "–";
const number = value => isNumber(value) ? Math.round(value).toLocaleString("en") : "–";
const plural = (count, what) => number(count) + " " + what + (count === 1 ? "" : "s");

function make(name, text, style) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (style) node.className = style;
  return node;
}
function drawn(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
  return node;
}
function put(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}
function row(cells, styles = {}) {
  const line = make("tr");
  line.append(...cells.map((text, i) => {
    const cell = make(i ? "td" : "th", text, styles[i]);
    if (!i) cell.scope = "row";
    return cell;
  }));
  return line;
}
function tiles(where, items) {
  at(where).replaceChildren(...items.map(([big, text]) => {
    const tile = make("div", undefined, "tile");
    tile.append(make("b", big), make("span", text));
    return tile;
  }));
}

// -- what the server says ------------------------------------------------------------------------------

function take(document) {
  if (document.whole) {
    buckets.clear();
    requests.clear();
  }
  for (const one of document.buckets || []) buckets.set(one.t, one);
  const oldest = document.now - 3600;
  if (!given) for (const t of buckets.keys()) if (t < oldest) buckets.delete(t);
  for (const one of document.requests) requests.set(one.id, one);
  if (!given) forget();
  seen = document;
  heardAt = Date.now();
  show();
}
function forget() {  // the oldest requests, those in trouble apart from the others
  const kinds = { true: 0, false: 0 };
  for (const one of [...requests.values()].sort((a, b) => (b.arrival_s || 0) - (a.arrival_s || 0)))
    if (++kinds[isTrouble(one)] > MOST_REQUESTS) requests.delete(one.id);
}
const isTrouble = one => one.state === "broken" || one.state === "declined";
const SUMMED = (into, from) => {
  for (const [name, value] of Object.entries(from || {}))
    if (typeof value === "object") SUMMED(into[name] ||= {}, value);
    else if (name.startsWith("least_")) into[name] = Math.min(into[name] ?? Infinity, value);
    else into[name] = (into[name] || 0) + value;
  return into;
};
function joined(some) {  // several buckets as one: counts add up, of live requests the most counts
  const one = { t: some[0].t, load: {}, steps: {}, classes: {}, draft_lengths: {} };
  for (const bucket of some) {
    SUMMED(one.steps, bucket.steps);
    SUMMED(one.classes, bucket.classes);
    for (const [name, value] of Object.entries(bucket.load || {})) one.load[name] = Math.max(one.load[name] || 0, value);
    Object.assign(one.draft_lengths, bucket.draft_lengths);
    if (bucket.mode) one.mode = bucket.mode;
    one.away ||= bucket.reason;
  }
  return one;
}
function stretch() {  // what is looked at: buckets in groups, from when to when
  const all = [...buckets.values()].sort((a, b) => a.t - b.t), step = seen.bucket_s;
  const end = given ? (all.length ? all[all.length - 1].t + step : step) : seen.now;
  const start = given ? (all.length ? all[0].t : 0) : end - Number(at("span").value);
  const width = step * Math.max(1, Math.ceil((end - start) / step / MOST_BARS)), groups = new Map();
  for (const one of all.filter(one => one.t + step > start)) {
    const t = Math.floor(one.t / width) * width;
    if (!groups.has(t)) groups.set(t, []);
    groups.get(t).push(one);
  }
  return { start, end, width, bars: [...groups].map(([t, some]) => ({ ...joined(some), t })) };
}

// -- what is shown -------------------------------------------------------------------------------------

function show() {
  const { status } = seen, snapshot = status.snapshot;
  showMode(status);
  at("load").hidden = !seen.buckets;  // the load is for operators
  if (seen.buckets) {
    const view = stretch(), whole = joined(view.bars.length ? view.bars : [{ t: 0 }]);
    showLoad(snapshot, whole);
    showReplicas(snapshot);
    showClasses(whole.classes);
    showCharts(view);
    showSteps(snapshot, whole.steps);
  }
  showRequests();
}
function showMode(status) {
  const mode = status.effective_mode || status.mode || "unknown", reason = (status.snapshot || {}).reason;
  const said = { enforce: "Enforcing: plans are carried out.", observe: "Observing: vLLM's own order runs." };
  const wanted = status.mode && status.effective_mode && status.mode !== status.effective_mode;
  const classes = Object.entries(status.class_modes || {}).map(([name, one]) => name + ": " + one).join(", ");
  const isOld = status.snapshot_age_s > 5;
  const last = Math.round(status.snapshot_age_s);
  put("mode", status.said || (isOld ? "The engine is not heard, for " + last + " s now: is it down? What is shown is old. " : "") +
    (status.profiling ? "Profiling: nothing is promised yet. " : "") +
    (isOld ? "" : said[mode] || "No engine has been heard yet.") + (wanted ? " Asked for: " + status.mode + "." : "") +
    (reason ? " Why: " + reason + "." : "") + (classes ? " By class: " + classes + "." : ""));
  at("mode").className = isOld || (wanted && !status.profiling) ? "notice" : "";
  put("model", status.model || "");
  at("emulated").hidden = !status.device;
  put("emulated", "Emulated device: no model runs and answers are made up (" + nameOf(status.device) +
    "). Times are those of a hardware file, nothing here is a measurement of a GPU.");
}
const nameOf = device => device && device.emulated
  ? [device.emulated, device.description].filter(Boolean).join(": ") : String(device || "");

function showLoad(snapshot, whole) {
  const sums = SUMMED({}, Object.values(whole.classes).reduce((all, one) => SUMMED(all, one), {})), load = whole.load;
  const now = snapshot || {}, tile = (name, text) => [number(now[name]), text + ", now; most " + number(load[name])];
  const blocks = now.num_kv_blocks;
  tiles("tiles", [
    [percent(sums.met || 0, sums.counted), "of SLOs met, " + when()],
    [percent(sums.kept || 0, (sums.kept || 0) + (sums.broken || 0)), "of promises kept, " + (sums.broken || "none") + " broken"],
    ...(snapshot ? [
      tile("num_promised", "promised"), tile("num_best_effort", "best-effort"), tile("num_waiting", "waiting to run"),
      [number(now.num_pending), "without a verdict, now"],
      [number(now.headroom_tokens_per_s), "prompt tokens/s still to promise"],
      [blocks ? percent(blocks - now.free_kv_blocks, blocks) : "–", "of the KV cache in use"],
    ] : [[number(sums.counted || 0), "requests with an SLO"]]),
  ]);
}
const when = () => given ? "all of the run" : at("span").selectedOptions[0].textContent;

function showReplicas(snapshot) {
  const every = (snapshot || {}).replicas || [];
  at("cluster").hidden = !every.length;
  at("replicas").replaceChildren(...every.map(one => {
    const how = one.usable ? one.effective_mode || "not heard yet" : "✗ not used";
    const used = one.num_kv_blocks ? percent(one.num_kv_blocks - one.free_kv_blocks, one.num_kv_blocks) : "–";
    return row([one.id, isNumber(one.age_s) ? one.age_s.toFixed(1) + " s ago" : "–", how + (one.reason ? ": " + one.reason : ""),
      number(one.num_promised), number(one.num_best_effort), number(one.num_waiting), used,
      number(one.headroom_tokens_per_s), share(one.margin_coverage)], { 2: one.usable ? "" : "bad" });
  }));
}
const spare = (sum, count, least) => count ? ms(sum / count) + ", least " + ms(least) : "–";
function showClasses(classes) {
  const totals = seen.totals || {}, names = Object.keys({ ...totals, ...classes }).sort();
  put("counted", "SLO met, promises and stages: " + when() + ". A request that was declined counts as a miss, one " +
    "whose client left not at all.");
  at("ever").hidden = Boolean(given);
  at("none").hidden = names.length > 0;
  at("classes").replaceChildren(...names.map(name => {
    const one = classes[name] || {}, ever = totals[name] || {}, promises = (one.kept || 0) + (one.broken || 0);
    const stage = which => percent(one[which + " met"] || 0, (one[which + " met"] || 0) + (one[which + " missed"] || 0));
    const line = row([name, percent(one.met || 0, one.counted) + " of " + number(one.counted || 0),
      percent(ever.met || 0, ever.counted) + " of " + number(ever.counted || 0),
      promises ? percent(one.kept || 0, promises) + (one.broken ? ", " + one.broken + " broken" : "") : "–",
      stage("prefill"), stage("thinking"), stage("answer"),
      spare(one.slack_ms, one.slack_n, one.least_slack_ms), spare(one.later_ms, one.later_n, one.least_later_ms)], { 3: one.broken ? "bad" : "" });
    line.children[2].hidden = Boolean(given);
    return line;
  }));
}
const STEPS = {
  ms: name => bar => bar.steps.foretold ? 1e3 * bar.steps[name] / bar.steps.foretold : null,
  rate: name => (bar, width) => bar.steps.n ? (bar.steps[name] || 0) / width : null,
};
const counted = name => bar => Object.values(bar.classes).reduce((sum, one) => sum + (one[name] || 0), 0);
const CHARTS = [
  { name: "Requests that ended", bars: [["met", counted("met")], ["missed or failed", bar => counted("missed")(bar) + counted("failed")(bar)],
    ["declined or rejected", bar => counted("declined")(bar) + counted("rejected")(bar)]] },
  { name: "Live requests", lines: [["promised", bar => bar.load.num_promised ?? null],
    ["best-effort", bar => bar.load.num_best_effort ?? null], ["waiting to run", bar => bar.load.num_waiting ?? null]] },
  { name: "What batches hold, tokens per second", lines: [["prompt tokens", STEPS.rate("prompt_tokens")],
    ["output tokens", STEPS.rate("decode_tokens")], ["draft tokens", STEPS.rate("draft_tokens")]] },
  { name: "Step time, mean", unit: ms, lines: [["measured", STEPS.ms("foretold_s")], ["predicted", STEPS.ms("predicted_s")]] },
];
function drafts(bars) {
  const names = [...new Set(bars.flatMap(bar => Object.keys(bar.draft_lengths)))].sort().slice(0, 4);
  const lines = names.map(name => [name, bar => bar.draft_lengths[name] ?? null]);
  return lines.length ? [{ name: "Draft tokens a step, by class", unit: value => value.toFixed(1), lines }] : [];
}
function showCharts(view) {
  const charts = [...CHARTS, ...drafts(view.bars)].map(chart => chart.bars ? barChart(chart, view) : lineChart(chart, view));
  at("charts").replaceChildren(...charts.filter(Boolean));
}
function figure(chart, view, top, shapes, legend) {
  const node = make("figure"), plot = make("div", undefined, "plot"), times = make("div", undefined, "times");
  const svg = drawn("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": chart.name + ": " + legend.join("; ") });
  svg.append(...away(view), ...shapes);
  plot.append(svg, make("span", top));
  const list = make("ul", undefined, "legend"), isAway = view.bars.some(isOff);
  list.append(...legend.map(text => make("li", text)), ...(isAway ? [make("li", "dotted ground: vLLM's own order")] : []));
  const minutes = Math.round((view.end - view.start) / 60);
  times.append(make("span", given ? "0 s" : minutes + " min ago"), make("span", given ? number(view.end - view.start) + " s" : "now"));
  node.append(make("figcaption", chart.name), plot, times, list);
  return node;
}
const isOff = bar => bar.mode === "observe";
const across = (view, t) => 1000 * (t - view.start) / (view.end - view.start);
const box = (view, bar, low, high) => "M" + across(view, bar.t).toFixed(1) + " " + (98 - low).toFixed(1) + "V" + (98 - high).toFixed(1) +
  "H" + across(view, bar.t + view.width * .9).toFixed(1) + "V" + (98 - low).toFixed(1) + "z";
function away(view) {
  const path = view.bars.filter(isOff).map(bar => "M" + across(view, bar.t) + " 0V100H" + across(view, bar.t + view.width) + "V0z").join("");
  return path ? [drawn("path", { class: "off", d: path })] : [];
}
const LINES = ["solid", "dashed", "dotted", "dash-dotted"], BARS = ["full", "striped", "hollow"];
function lineChart(chart, view) {
  const unit = chart.unit || number, known = chart.lines.map(([, of]) => view.bars.map(bar => [bar, of(bar, view.width)]).filter(([, v]) => v !== null));
  if (!known.some(points => points.length)) return null;
  const most = Math.max(1e-9, ...known.flat().map(([, value]) => value));
  const shapes = known.map((points, i) => drawn("path", { class: "line" + i, d: points.map(([bar, value], j) => {
    const isNext = j && bar.t - points[j - 1][0].t < 1.5 * view.width;
    const place = across(view, bar.t + view.width / 2).toFixed(1) + " " + (97 - 93 * value / most).toFixed(1);
    return isNext ? "L" + place : "M" + place + "h.1";
  }).join("") }));
  const legend = chart.lines.map(([name], i) => LINES[i] + ": " + name + ", last " + (known[i].length ? unit(known[i][known[i].length - 1][1]) : "–"));
  return figure(chart, view, "top " + unit(most), shapes, legend);
}
function barChart(chart, view) {
  const heights = view.bars.map(bar => chart.bars.map(([, of]) => of(bar)));
  const most = Math.max(1, ...heights.map(all => all.reduce((a, b) => a + b, 0)));
  const shapes = chart.bars.map((_, i) => drawn("path", { class: "bar" + i, d: view.bars.map((bar, j) => {
    const low = heights[j].slice(0, i).reduce((a, b) => a + b, 0);
    return heights[j][i] ? box(view, bar, 93 * low / most, 93 * (low + heights[j][i]) / most) : "";
  }).join("") }));
  const legend = chart.bars.map(([name], i) => BARS[i] + ": " + name + ", " + number(heights.reduce((sum, all) => sum + all[i], 0)));
  return figure(chart, view, "top " + number(most) + " in " + Math.round(view.width) + " s", shapes, legend);
}
function showSteps(snapshot, steps) {
  const one = snapshot || {}, plan = one.plan_s || {}, clock = one.clock_error_s || {};
  const faults = Object.values(one.planner_faults || {}).reduce((a, b) => a + b, 0), away = at("span").disabled ? "" : ", " + when();
  at("steps").hidden = !snapshot && !steps.n;
  tiles("predicted", [
    [steps.foretold ? percent(steps.error_s, steps.foretold_s) : "–", "mean error of a step's predicted time" + away],
    [percent(steps.n - (steps.late || 0), steps.n), "of steps within prediction and margin"],
    ...(snapshot ? [
      [share(one.margin_coverage), "margin coverage as the scheduler sees it (under 90 %: steps down)"],
      [isNumber(plan.p50) ? ms(plan.p50 * 1000) : "–", "to plan a step, median"],
      [isNumber(clock.p50) ? ms(clock.p50 * 1000) : "–", "the plan's clock off the wall clock"],
      [share(one.device_time_lost), "of its time the device waits for us"],
      [number(one.step_downs || 0) + " / " + number(faults), "step-downs / planner faults"],
    ] : []),
    [number(snapshot ? one.steps : steps.n), "steps" + (snapshot ? " since the start" : "")],
  ]);
  showProfile(one.profile);
}
function showProfile(profile) {
  if (!profile) return put("profile", "");
  const made = profile.created ? ", made " + profile.created : "", error = profile.mape_heldout;
  const reach = Object.entries(profile.reach || {}).map(([name, most]) => number(most) + " " + name.replaceAll("_", " "));
  put("profile", "Performance profile" + made + ": R² " + (isNumber(profile.r2) ? profile.r2.toFixed(3) : "–") +
    ", held-out error " + share(error) + ", from " + plural(profile.num_steps, "step") + ", batches of up to " +
    number(profile.max_num_batched_tokens) + " tokens" + (reach.length ? "; measured up to " + reach.join(", ") : "") + ".");
}

// -- requests ------------------------------------------------------------------------------------------

const NAMES = { broken: "✗ broken promise", declined: "– declined", met: "✓ met", missed: "✗ missed, not promised" };
function titleOf(one) {
  const time = one.arrival_s > 1e9 ? new Date(one.arrival_s * 1000).toLocaleTimeString() : isNumber(one.arrival_s) ? one.arrival_s.toFixed(1) + " s" : "";
  return [NAMES[one.state] || one.state, one.class, one.reason, time, one.tenant].filter(Boolean).join(" · ");
}
function showRequests() {
  const which = at("which").value, tests = { all: () => true, trouble: isTrouble };
  const all = [...requests.values()].sort((a, b) => (b.arrival_s || 0) - (a.arrival_s || 0));
  const shown = all.filter(tests[which] || (one => one.state === which)), before = new Map();
  for (const node of at("list").children) before.set(node.dataset.id, node);
  const nodes = shown.map(one => entry(before.get(one.id), one)), list = at("list"), focused = document.activeElement;
  if (nodes.length !== list.children.length || nodes.some((node, i) => node !== list.children[i])) list.replaceChildren(...nodes);
  if (focused && focused.isConnected) focused.focus({ preventScroll: true });
  at("calm").hidden = shown.length > 0;
  put("calm", all.length ? "None of the last " + plural(all.length, "request") + "." : "No request with an SLO yet.");
}
function entry(node, one) {
  if (!node) {
    node = make("details");
    node.append(make("summary"));
    node.dataset.id = one.id;
    node.addEventListener("toggle", () => node.open && tell(node));
  }
  const said = titleOf(one);
  if (node.dataset.said !== said) {
    node.dataset.said = node.firstChild.textContent = said;
    if (node.open) tell(node);
  }
  return node;
}
async function tell(node) {
  if (node.children.length === 1) node.append(make("p", "Asking why …", "soft"));
  try {
    const why = given ? given.explanations[node.dataset.id] : await (await get("v1/slo/requests/" + encodeURIComponent(node.dataset.id) + "/explanation")).json();
    const lines = why ? [...why.story, ...(why.note ? ["Not explained further: " + why.note + "."] : []),
      "Ids: " + [why.request.id, why.request.request_id].filter(Boolean).join(", ")] : ["Nothing more was kept of it."];
    const drawing = why && why.picture ? [new DOMParser().parseFromString(why.picture, "text/html").body.firstChild] : [];
    fill(node, [...lines.map(line => make("p", line)), ...drawing]);
  } catch (problem) {
    fill(node, [make("p", "No answer: " + problem.message)]);
  }
}
function fill(node, told) {  // the summary stays where it is, and keeps the focus
  while (node.children.length > 1) node.lastChild.remove();
  node.append(...told);
}

// -- asking --------------------------------------------------------------------------------------------

function complain(text) {
  at("problem").hidden = !text;
  put("problem", text);
}
async function get(path, options = {}) {
  const answer = await fetch(base + path, { ...options, headers: key ? { authorization: "Bearer " + key } : {} });
  if (!answer.ok) throw Object.assign(new Error(path + " answered " + answer.status), { status: answer.status });
  return answer;
}
async function listen() {  // events until the stream ends, or is silent as behind a proxy that holds it back
  const stop = new AbortController();
  let timer = setTimeout(() => { isStreamed = false; stop.abort(); }, SILENT_MS);
  const leave = wake = () => stop.abort();
  try {
    const reader = (await get("v1/slo/events", { signal: stop.signal })).body.getReader(), decoder = new TextDecoder();
    for (let text = "", part; !(part = await reader.read()).done;) {
      text += decoder.decode(part.value, { stream: true });
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        clearTimeout(timer);
        timer = setTimeout(() => stop.abort(), SILENT_MS);
        take(JSON.parse(event.slice(6)));
        answered();
      }
    }
  } catch (problem) {
    if (problem.name !== "AbortError") throw problem;
  } finally {
    clearTimeout(timer);
    if (wake === leave) wake = () => {};
  }
}
function answered() {
  at("ask").hidden = true;
  complain("");
}
async function run() {
  for (;;) {
    if (!paused && !document.hidden) {
      try {
        if (isStreamed) await listen();
        if (!paused && !document.hidden) {
          take(await (await get("v1/slo/live")).json());
          answered();
        }
      } catch (problem) {
        const isLocked = problem.status === 401 || problem.status === 404;
        at("ask").hidden = !isLocked && !key;
        complain(isLocked ? "This server shows this page to keys of its own alone, or to nobody." :
          "The server does not answer (" + problem.message + "). What is shown is old; trying again.");
      }
    }
    await new Promise(done => {
      const timer = setTimeout(done, AGAIN_MS);
      wake = () => { clearTimeout(timer); done(); };
    });
  }
}
at("which").onchange = showRequests;
at("span").onchange = () => seen && show();
if (given) {
  for (const id of ["pause", "spans", "heard"]) at(id).hidden = true;
  put("title", document.title = given.title);
  take({ whole: true, ...given });
} else {
  setInterval(() => put("heard", heardAt ? (paused ? "paused, " : "") + "updated " + Math.round((Date.now() - heardAt) / 1000) + " s ago" : ""), 1000);
  document.addEventListener("visibilitychange", () => wake());
  at("pause").onclick = () => {
    paused = !paused;
    at("pause").textContent = paused ? "Go on" : "Pause";
    at("pause").setAttribute("aria-pressed", paused);
    wake();
  };
  at("ask").onsubmit = event => {
    event.preventDefault();
    key = at("key").value.trim();
    sessionStorage.setItem("slo-key", key);
    wake();
  };
  run();
}
