/* The page: reads the stream, keeps the model, and draws what is visible. Read stream.js, model.js,
   map.js and tables.js next. */

import { details } from "./details.js";
import { MapDrawing } from "./map.js";
import { Model } from "./model.js";
import { Stream } from "./stream.js";
import { Tables } from "./tables.js";
import { amount, attribute, children, html, pathClass, put, svg } from "./text.js";

const TOKEN = "freeflow-token";
const VIEWS = ["map", "connections", "services", "hosts"];
const at = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.model = new Model();
    this.drawing = new MapDrawing(at("drawing"), this.model, () => this.drawDetails());
    this.tables = new Tables(Object.fromEntries(VIEWS.map((view) => [view, at(`panel-${view}`)])));
    this.view = "map";
    this.paused = false;
    this.updates = 0;
    this.stream = new Stream({
      map: (map) => this.gotMap(map),
      traffic: (traffic) => this.gotTraffic(traffic),
      trouble: (trouble) => this.say(`the plugin has no status: ${trouble.error}`),
      lost: (why) => this.say(`${why}; trying again`),
      refused: (status, refusal) => this.refused(status, refusal),
    });
    this.listen();
    this.stream.token = takeToken();
    this.stream.start();
  }

  gotMap(map) {
    this.model.setMap(map);
    at("login").hidden = true;
    at("content").hidden = false;
    put(at("host"), "textContent", map.host);
    document.title = `FreeFlow on ${map.host}`;
    const engine = map.engine || "not answering";
    const versions = `FreeFlow ${map.version}, Docker ${engine}, Linux ${map.kernel}`;
    put(at("versions"), "textContent", versions);
    this.drawProblems();
    this.drawing.drawMap();
  }

  gotTraffic(traffic) {
    if (!this.model.map) return;
    this.model.setTraffic(traffic);
    this.say(traffic.error ? `connections are not known: ${traffic.error}` : "live, every 2 s");
    this.draw();
    this.updates += 1;
    document.documentElement.dataset.updates = String(this.updates);
  }

  draw() {
    this.drawLegend();
    const undrawn = this.drawing.drawEdges();
    const unlisted = this.model.traffic.left_out;
    const unshown = this.model.map.left_out;
    const notes = [];
    if (undrawn) notes.push(`${undrawn} lines with less traffic are only in the view Connections.`);
    if (unlisted) notes.push(`${unlisted} more pairs with less traffic are not listed.`);
    if (unshown) notes.push(`${unshown} containers of other hosts are not shown.`);
    put(at("left-out"), "textContent", notes.join(" "));
    this.tables.draw(this.model);
    this.drawDetails();
  }

  drawDetails() {
    if (this.view === "map") at("details").replaceChildren(...details(this.model, this.drawing.chosen));
  }

  drawProblems() {
    const { problems } = this.model.map;
    const worst = problems.some((each) => each.severity === "error") ? "error" : "warning";
    const text = problems.length === 1 ? "1 problem" : `${problems.length} problems`;
    put(at("verdict"), "textContent", problems.length ? text : "everything works");
    put(at("verdict"), "className", problems.length ? worst : "");
    at("problems").hidden = !problems.length;
    at("problem-list").replaceChildren(...problems.map((each) => {
      const cause = each.cause ? `${each.what}: ${each.cause}. ` : `${each.what}. `;
      const severity = html("strong", `${each.severity}: `);
      return html("li", [severity, cause, "Do: ", html("code", each.remedy)], each.severity);
    }));
  }

  /** A line for each path that carries connections, with its pattern and a box to hide it. */
  drawLegend() {
    const paths = Object.entries(this.model.traffic.paths);
    const legend = at("legend");
    children(legend, paths.length, makeLegendItem);
    paths.forEach(([path, total], index) => {
      const item = legend.children[index];
      const [box, , text] = item.firstChild.children;
      attribute(item, "class", pathClass(path));
      item.path = path;
      put(box, "checked", !this.model.hidden.has(path));
      put(text, "textContent", `${path}: ${total.connections}, ${amount(total.bytes)}/s`);
    });
    const { router_cpu: router, relay_cpu: relay } = this.model.traffic;
    const percent = (part) => (part === null ? "–" : `${part.toFixed(1)} %`);
    put(at("costs"), "textContent", `processor: router ${percent(router)}, relay ${percent(relay)}`);
  }

  say(text) {
    if (!this.paused) put(at("live"), "textContent", text);
  }

  refused(status, refusal) {
    if (status !== 401) {
      const remedy = refusal.remedy ? ` Do: ${refusal.remedy}` : "";
      this.say(`${refusal.what}: ${refusal.cause}.${remedy}`);
      return;
    }
    this.say("the token is needed");
    at("content").hidden = true;
    at("login").hidden = false;
    put(at("login-error"), "textContent", this.stream.token ? "This is not the token." : "");
    at("token").focus();
  }

  show(view) {
    this.view = view;
    for (const each of VIEWS) {
      const chosen = each === view;
      at(`panel-${each}`).hidden = !chosen;
      attribute(at(`tab-${each}`), "aria-selected", String(chosen));
      attribute(at(`tab-${each}`), "tabindex", chosen ? null : "-1");
    }
    if (this.model.map) this.draw();
  }

  // --- what the user does

  listen() {
    at("pause").addEventListener("click", () => this.pause());
    at("filter").addEventListener("input", (event) => {
      this.model.filter = event.target.value.trim();
      this.refresh();
    });
    at("legend").addEventListener("change", (event) => {
      const { path } = event.target.closest("li");
      if (event.target.checked) this.model.hidden.delete(path);
      else this.model.hidden.add(path);
      this.refresh();
    });
    at("login").addEventListener("submit", (event) => {
      event.preventDefault();
      this.stream.token = at("token").value;
      sessionStorage.setItem(TOKEN, this.stream.token);
      at("token").value = "";
      this.stream.start();
    });
    // A link that is opened in this tab only changes the address after its #.
    window.addEventListener("hashchange", () => {
      const token = takeToken();
      if (token === this.stream.token) return;
      this.stream.token = token;
      if (!this.paused) this.stream.start();
    });
    at("tabs").addEventListener("click", (event) => {
      const tab = event.target.closest("[role=tab]");
      if (tab) this.show(tab.id.replace("tab-", ""));
    });
    at("tabs").addEventListener("keydown", (event) => this.tabKey(event));
    // A page that nobody sees needs no stream.
    document.addEventListener("visibilitychange", () => {
      if (this.paused) return;
      if (document.hidden) this.stream.stop();
      else this.stream.start();
    });
  }

  refresh() {
    this.model.choose();
    if (this.model.map) this.draw();
  }

  pause() {
    this.paused = !this.paused;
    attribute(at("pause"), "aria-pressed", String(this.paused));
    if (this.paused) {
      this.stream.stop();
      put(at("live"), "textContent", "paused");
    } else {
      this.say("connecting");
      this.stream.start();
    }
  }

  tabKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = (VIEWS.indexOf(this.view) + step + VIEWS.length) % VIEWS.length;
    this.show(VIEWS[index]);
    at(`tab-${VIEWS[index]}`).focus();
  }
}

function makeLegendItem() {
  const box = html("input");
  box.type = "checkbox";
  const line = svg("svg", { viewBox: "0 0 34 10", "aria-hidden": "true" });
  line.append(svg("path", { class: "swatch", d: "M1 5H33" }));
  return html("li", [html("label", [box, line, html("span")])]);
}

/** The token from the link that `freeflow ui` prints, or of this tab. It does not stay in the
    address, where history and other people would see it. */
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    sessionStorage.setItem(TOKEN, found);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(TOKEN) ?? "";
}

new Page();
