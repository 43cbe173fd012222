/* What is known of the chosen container, service or connection. */

import { amount, count, html, sentence } from "./text.js";

const LINES = 12;

/** The contents of the panel for what has this key. */
export function details(model, key) {
  const node = model.nodes.get(key);
  if (node) return ofNode(model, key, node);
  const edge = model.edge(key);
  if (edge) return ofEdge(model, edge);
  return [
    html("h3", "Details"),
    html("p", "Point at a container, a service or a connection, or go to it by keyboard.", "note"),
  ];
}

function ofNode(model, key, node) {
  const rows = [];
  if (node.kind === "container") {
    rows.push(["Service", node.service || "–"]);
    rows.push(["Host", node.host ? node.host + (node.own ? " (this host)" : "") : "not known"]);
    rows.push(["Networks", node.networks.join(", ")]);
    rows.push(["Addresses", node.addresses.join(", ")]);
  } else if (node.kind === "service") {
    rows.push(["VIP", node.vip || "–"], ["Network", node.network]);
    rows.push(["Tasks", names(model, node.tasks)]);
    rows.push(["Balance", node.balance]);
    rows.push(["New connections from here", names(model, node.here)]);
    if (node.why) rows.push(["Because", node.why]);
  }
  const edges = model.byNode.get(key) ?? [];
  return [html("h3", node.name), list(rows), ...lines(model, key, edges)];
}

function names(model, keys) {
  const shown = keys.slice(0, LINES).map((key) => model.name(key));
  if (keys.length > LINES) shown.push(`${keys.length - LINES} more`);
  return shown.join(", ") || "none";
}

function lines(model, key, edges) {
  if (!edges.length) return [html("p", "It has no connections that this host knows.", "note")];
  const shown = edges.slice(0, LINES).map((edge) => {
    const peer = model.name(edge.a === key ? edge.b : edge.a);
    const rate = edge.to_a === null ? "new" : `${amount(edge.to_a + edge.to_b)}/s`;
    const why = Object.keys(edge.reasons).map((word) => sentence(model.traffic.reasons, word));
    const text = `${peer}: ${edge.path}, ${edge.connections}×, ${rate}`;
    return html("li", why.length ? `${text}; ${why[0]}` : text);
  });
  if (edges.length > LINES) shown.push(html("li", `${edges.length - LINES} more`));
  return [html("ul", shown)];
}

function ofEdge(model, edge) {
  const a = model.name(edge.a);
  const b = model.name(edge.b);
  const rows = [
    ["Path", edge.path],
    ["Connections", String(edge.connections)],
    [`To ${b}`, `${amount(edge.to_b)}/s`],
    [`To ${a}`, `${amount(edge.to_a)}/s`],
    ["Messages", `${count(edge.messages)}/s`],
    ["Sent again", `${count(edge.retransmits)} segments/s`],
    ["Round trip", edge.round_trip_ms === null ? "–" : `${edge.round_trip_ms.toFixed(2)} ms`],
    ["Networks", edge.networks.join(", ")],
    ["For example", edge.example],
  ];
  const why = Object.entries(edge.reasons).map(([word, number]) =>
    html("li", `${word} (${number}): ${sentence(model.traffic.reasons, word)}`));
  const parts = [html("h3", model.title(edge)), list(rows)];
  if (why.length) parts.push(html("p", "Why it takes no faster path:"), html("ul", why));
  return parts;
}

function list(rows) {
  return html("dl", rows.flatMap(([name, value]) => [html("dt", name), html("dd", value)]));
}
