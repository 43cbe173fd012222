/* The map: hosts, services and containers in their boxes, and connections as lines between them.

   Elements are kept by key, and only what differs is set anew. So an update costs as much as has
   changed, however many containers there are. */

import { layout } from "./layout.js";
import { UNNAMED, attribute, pathClass, put, short, svg } from "./text.js";

/* More lines than these are no picture any more; the table has all. */
const EDGES = 300;

export class MapDrawing {
  constructor(root, model, changed) {
    this.root = root;
    this.model = model;
    this.changed = changed;
    this.layers = {};
    for (const name of ["hosts", "edges", "members", "groups", "nodes"]) {
      this.layers[name] = svg("g");
      root.append(this.layers[name]);
    }
    this.elements = { hosts: new Map(), groups: new Map(), nodes: new Map(), edges: new Map() };
    this.places = null;
    this.chosen = null;
    this.pinned = null;
    this.current = null;
    this.listen();
  }

  /** Draw the model's map anew, where it differs. */
  drawMap() {
    this.places = layout(this.model.map);
    const { width, height } = this.places;
    attribute(this.root, "viewBox", `0 0 ${width} ${height}`);
    this.root.classList.toggle("crowded", this.places.crowded);
    this.sync("hosts", this.places.hosts, makeBox, (element, host) => {
      attribute(element, "class", host.own ? "host own" : "host");
      setBox(element, host, "title", Math.floor((host.width - 20) / 8));
    });
    this.sync("groups", this.places.groups, makeBox, (element, group) => {
      attribute(element, "class", "group");
      setBox(element, group, "soft", Math.floor((group.width - 16) / 7));
    });
    const nodes = [...this.places.nodes].map(([key, place]) => ({ key, ...place }));
    this.sync("nodes", nodes, makeNode, (element, place) => this.setNode(element, place));
    if (!this.elements.nodes.has(this.current)) this.makeCurrent(this.order()[0] ?? null);
    this.drawEdges();
  }

  /** Draw the model's connections anew, where they differ. Answers how many are not drawn. */
  drawEdges() {
    if (!this.places) return 0;
    const drawn = this.model.shown.filter((edge) => this.has(edge.a) && this.has(edge.b));
    const some = drawn.slice(0, EDGES);
    this.sync("edges", some, makeEdge, (element, edge) => this.setEdge(element, edge));
    for (const [key, element] of this.elements.nodes) {
      const edges = this.model.byNode.has(key);
      const fits = edges || this.model.matches(this.model.nodeText(key));
      element.classList.toggle("out", !fits);
      if (key === UNNAMED) attribute(element, "display", edges ? null : "none");
    }
    this.mark();
    return drawn.length - some.length;
  }

  has(key) {
    return this.places.nodes.has(key);
  }

  /** Make, keep and remove elements of a layer, so that there is one for each item. */
  sync(layer, items, make, set) {
    const known = this.elements[layer];
    const wanted = new Set(items.map((item) => item.key));
    for (const [key, element] of known) {
      if (wanted.has(key)) continue;
      element.remove();
      known.delete(key);
    }
    for (const item of items) {
      let element = known.get(item.key);
      if (!element) {
        element = make();
        known.set(item.key, element);
        this.layers[layer].append(element);
      }
      element.key = item.key;
      set(element, item);
    }
  }

  setNode(element, place) {
    element.classList.toggle(place.kind, true);
    const { x, y, width, height } = place;
    setRect(element.firstChild, { x, y, width, height });
    const texts = element.querySelectorAll("text");
    const middle = place.below ? y + 15 : y + height / 2 + 4;
    setText(texts[0], short(place.label, Math.floor((width - 8) / 6.6)), x + 6, middle);
    setText(texts[1], place.below ?? "", x + 6, y + 29);
    const node = this.model.nodes.get(place.key);
    const where = node.kind === "container" ? `, on ${node.host || "an unknown host"}` : "";
    const what = { container: "container", service: "service", unnamed: "" }[node.kind];
    const of = node.kind === "container" && node.service ? ` of ${node.service}` : "";
    attribute(element, "aria-label", `${what} ${node.name}${of}${where}`.trim());
  }

  setEdge(element, edge) {
    const kind = pathClass(edge.path);
    if (element.kind !== kind) {
      if (element.kind) element.classList.remove(element.kind);
      element.classList.add(kind);
      element.kind = kind;
    }
    const line = curve(this.places.nodes.get(edge.a), this.places.nodes.get(edge.b), edge.number);
    const [hit, wire] = element.children;
    attribute(hit, "d", line);
    attribute(wire, "d", line);
    put(wire.style, "strokeWidth", `${thickness((edge.to_a ?? 0) + (edge.to_b ?? 0))}px`);
    const many = edge.connections === 1 ? "1 connection" : `${edge.connections} connections`;
    attribute(element, "aria-label", `${this.model.title(edge)}: ${edge.path}, ${many}`);
  }

  // --- what is chosen

  listen() {
    const keyOf = (event) => event.target.closest(".node, .edge")?.key ?? null;
    this.root.addEventListener("pointerover", (event) => this.choose(this.pinned ?? keyOf(event)));
    this.root.addEventListener("pointerleave", () => this.choose(this.pinned));
    this.root.addEventListener("click", (event) => this.pin(keyOf(event)));
    // Not at the drawing itself: Chromium makes drawings that hear of focus stops of their own.
    const around = this.root.parentElement;
    around.addEventListener("focusin", (event) => {
      const key = keyOf(event);
      if (key !== null && this.elements.nodes.has(key)) this.makeCurrent(key);
      this.choose(key);
    });
    around.addEventListener("focusout", () => this.choose(this.pinned));
    this.root.addEventListener("keydown", (event) => this.pressed(event));
  }

  choose(key) {
    if (key === this.chosen) return;
    this.chosen = key;
    this.mark();
    this.changed();
  }

  pin(key) {
    this.pinned = key === this.pinned ? null : key;
    this.chosen = key;
    this.mark();
    this.changed();
  }

  /** Show which lines belong to what is chosen. */
  mark() {
    const edges = new Set((this.model.byNode.get(this.chosen) ?? []).map((edge) => edge.key));
    edges.add(this.chosen);
    for (const [key, element] of this.elements.edges) {
      element.classList.toggle("active", edges.has(key));
      element.classList.toggle("pinned", key === this.pinned);
    }
    for (const [key, element] of this.elements.nodes) {
      element.classList.toggle("pinned", key === this.pinned);
    }
    const known = this.elements.nodes.has(this.chosen) || this.elements.edges.has(this.chosen);
    this.root.classList.toggle("chosen", known);
    this.drawMembers();
  }

  /** Lines from a chosen service to its tasks. */
  drawMembers() {
    const node = this.model.nodes.get(this.chosen);
    const tasks = node?.kind === "service" ? node.tasks.filter((key) => this.has(key)) : [];
    const from = this.places?.nodes.get(this.chosen);
    const lines = from ? tasks.map((key) => curve(from, this.places.nodes.get(key), 0)) : [];
    const layer = this.layers.members;
    while (layer.childElementCount > lines.length) layer.lastElementChild.remove();
    lines.forEach((line, index) => {
      if (!layer.children[index]) layer.append(svg("path", { class: "member" }));
      attribute(layer.children[index], "d", line);
    });
  }

  // --- keys

  order() {
    return [...this.elements.nodes].filter(([, each]) => !each.hasAttribute("display")).map(([key]) => key);
  }

  /** The one element of the map that Tab reaches. */
  makeCurrent(key) {
    if (this.current !== null) {
      const before = this.elements.nodes.get(this.current);
      if (before) attribute(before, "tabindex", "-1");
    }
    this.current = key;
    if (key !== null) attribute(this.elements.nodes.get(key), "tabindex", "0");
  }

  pressed(event) {
    const key = event.target.closest(".node, .edge")?.key;
    if (key === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    const step = this.elements.nodes.has(key) ? this.nodeKey(key, event.key) : this.edgeKey(key, event.key);
    if (!step) return;
    event.preventDefault();
    if (step !== true) step.focus();
  }

  /** The element to go to; true: the key is done with; false: it means nothing here. */
  nodeKey(key, pressed) {
    const keys = this.order();
    const at = keys.indexOf(key);
    const to = {
      ArrowRight: keys[(at + 1) % keys.length],
      ArrowLeft: keys[(at + keys.length - 1) % keys.length],
      Home: keys[0],
      End: keys[keys.length - 1],
    }[pressed];
    if (to !== undefined) return this.elements.nodes.get(to);
    if (pressed === "ArrowDown") return this.edgesOf(key)[0] ?? true;
    return this.commonKey(key, pressed);
  }

  edgeKey(key, pressed) {
    const edges = this.edgesOf(this.current);
    const at = edges.indexOf(this.elements.edges.get(key));
    if (pressed === "ArrowRight" || pressed === "ArrowDown") return edges[(at + 1) % edges.length] ?? true;
    if (pressed === "ArrowLeft") return edges[(at + edges.length - 1) % edges.length] ?? true;
    if (pressed === "ArrowUp") return this.elements.nodes.get(this.current) ?? true;
    return this.commonKey(key, pressed);
  }

  commonKey(key, pressed) {
    if (pressed === "Enter" || pressed === " ") this.pin(key);
    else if (pressed === "Escape") {
      this.pinned = null;
      this.mark();
      this.changed();
    } else return false;
    return true;
  }

  edgesOf(key) {
    const found = (this.model.byNode.get(key) ?? []).map((edge) => this.elements.edges.get(edge.key));
    return found.filter(Boolean);
  }
}

function makeBox() {
  const made = svg("g");
  made.append(svg("rect", { rx: 8 }), svg("text"));
  return made;
}

function setBox(element, box, className, letters) {
  const [rect, text] = element.children;
  setRect(rect, box);
  attribute(text, "class", className);
  setText(text, short(box.label, Math.max(4, letters)), box.x + 8, box.y + 16);
}

function makeNode() {
  const made = svg("g", { class: "node", role: "img", tabindex: -1, "aria-describedby": "details" });
  made.append(svg("rect", { rx: 4 }), svg("text"), svg("text", { class: "soft" }));
  return made;
}

function makeEdge() {
  const made = svg("g", { class: "edge", role: "img", tabindex: -1, "aria-describedby": "details" });
  made.append(svg("path", { class: "hit" }), svg("path", { class: "wire" }));
  return made;
}

function setRect(rect, { x, y, width, height }) {
  attribute(rect, "x", x);
  attribute(rect, "y", y);
  attribute(rect, "width", width);
  attribute(rect, "height", height);
}

function setText(element, text, x, y) {
  put(element, "textContent", text);
  attribute(element, "x", text ? x : null);
  attribute(element, "y", text ? y : null);
}

/** Pixels: one more for ten times as much, from 100 bytes per second. In quarters, so that small
    changes draw nothing. */
function thickness(rate) {
  const wide = 1.5 + Math.max(0, Math.min(7, Math.log10(Math.max(rate, 1) / 100)));
  return Math.round(wide * 4) / 4;
}

/** A line between two boxes; `number` keeps several of one pair apart. */
function curve(a, b, number) {
  const from = { x: a.x + a.width / 2, y: a.y + a.height / 2 };
  const to = { x: b.x + b.width / 2, y: b.y + b.height / 2 };
  if (a === b) {
    const size = 16 + 6 * number;
    return `M${from.x} ${from.y}c${size} ${-2 * size} ${-size} ${-2 * size} 0 0`;
  }
  const dx = to.x - from.x;
  const dy = to.y - from.y;
  const length = Math.hypot(dx, dy) || 1;
  const bend = Math.min(40, length / 6) + 12 * number;
  const x = (from.x + to.x) / 2 - (dy / length) * bend;
  const y = (from.y + to.y) / 2 + (dx / length) * bend;
  return `M${from.x} ${from.y}Q${x.toFixed(1)} ${y.toFixed(1)} ${to.x} ${to.y}`;
}
