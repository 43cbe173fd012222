/* The last map and traffic, what belongs to what, and what the filter lets through. */

import { UNNAMED } from "./text.js";

export class Model {
  constructor() {
    this.map = null;
    this.traffic = { edges: [], paths: {}, reasons: {}, interval: 0, left_out: 0, error: "" };
    this.filter = "";
    this.hidden = new Set();
    this.nodes = new Map();
    this.byNode = new Map();
    this.shown = [];
  }

  setMap(map) {
    this.map = map;
    this.nodes = new Map([[UNNAMED, { kind: "unnamed", name: "addresses without a name" }]]);
    for (const each of map.containers) this.nodes.set(each.key, { kind: "container", ...each });
    for (const each of map.services) this.nodes.set(each.key, { kind: "service", ...each });
    this.choose();
  }

  setTraffic(traffic) {
    this.traffic = traffic;
    this.choose();
  }

  /** Edges that filter and legend let through, the busiest first, each with a key of its own.

      A connection that changes its path keeps its key as long as its two nodes have no other. */
  choose() {
    const numbers = new Map();
    this.byNode = new Map();
    this.shown = [];
    for (const edge of this.traffic.edges) {
      if (this.hidden.has(edge.path) || !this.matches(this.edgeText(edge))) continue;
      const pair = `${edge.a} ${edge.b}`;
      const number = numbers.get(pair) ?? 0;
      numbers.set(pair, number + 1);
      const shown = { ...edge, key: `${pair} ${number}`, number };
      this.shown.push(shown);
      for (const end of new Set([edge.a, edge.b])) {
        if (!this.byNode.has(end)) this.byNode.set(end, []);
        this.byNode.get(end).push(shown);
      }
    }
  }

  matches(text) {
    return !this.filter || text.toLowerCase().includes(this.filter.toLowerCase());
  }

  name(key) {
    return this.nodes.get(key)?.name ?? key;
  }

  /** "web.1 – db.1". */
  title(edge) {
    return `${this.name(edge.a)} – ${this.name(edge.b)}`;
  }

  edge(key) {
    return this.shown.find((each) => each.key === key);
  }

  edgeText(edge) {
    const words = [edge.path, edge.example, ...edge.networks, ...Object.keys(edge.reasons)];
    return [...words, ...[edge.a, edge.b].map((key) => this.nodeText(key))].join("\n");
  }

  nodeText(key) {
    const node = this.nodes.get(key);
    if (!node) return key;
    const words = [node.name, node.service, node.host, node.vip, node.network];
    return [...words, ...(node.addresses ?? []), ...(node.networks ?? [])].filter(Boolean).join("\n");
  }
}
