/* The same as in the map, as tables: for screen readers, for the keyboard, and to copy from. Rows
   are used again, so an update sets only the cells that differ. */

import { amount, children, count, html, put, sentence } from "./text.js";

const ROWS = 200;

class Table {
  constructor(panel, title, heads) {
    this.caption = html("caption", title);
    this.title = title;
    this.body = html("tbody");
    this.numbers = heads.map((head) => head.startsWith("#"));
    const cells = heads.map((head) => {
      const cell = html("th", head.replace("#", ""), head.startsWith("#") ? "number" : "");
      cell.scope = "col";
      return cell;
    });
    const table = html("table", [this.caption, html("thead", [html("tr", cells)]), this.body]);
    panel.append(html("div", [table], "scroll"));
  }

  draw(rows) {
    const some = rows.slice(0, ROWS);
    const more = rows.length - some.length;
    const note = more ? `; ${more} more: use the filter` : "";
    put(this.caption, "textContent", this.title + note);
    children(this.body, some.length, () => this.row());
    some.forEach((row, index) => {
      const cells = this.body.children[index].children;
      row.forEach((text, column) => put(cells[column], "textContent", text));
    });
  }

  row() {
    const cells = this.numbers.map((number, column) => {
      const cell = html(column ? "td" : "th", "", number ? "number" : "");
      if (!column) cell.scope = "row";
      return cell;
    });
    return html("tr", cells);
  }
}

export class Tables {
  constructor(panels) {
    this.panels = panels;
    this.connections = new Table(panels.connections, "Connections, the busiest first", [
      "Between", "and", "Path", "#Connections", "#Bytes/s there", "#Bytes/s back", "#Messages/s",
      "#Sent again/s", "#Round trip", "Why no faster path",
    ]);
    this.services = new Table(panels.services, "Services and their tasks", [
      "Service", "Network", "VIP", "Tasks", "Balance", "New connections from here",
    ]);
    this.hosts = new Table(panels.hosts, "Hosts", [
      "Host", "Address", "Networks", "Session", "Link of the relays", "Note",
    ]);
    this.networks = new Table(panels.hosts, "Networks", [
      "Network", "Driver", "Path of packets", "Acceleration", "Subnets", "Note",
    ]);
  }

  /** Draw the table that is visible. */
  draw(model) {
    const { connections, services, hosts } = this.panels;
    if (!connections.hidden) {
      this.connections.draw(model.shown.map((edge) => connection(model, edge)));
    }
    if (!services.hidden) {
      const rows = model.map.services.map((each) => service(model, each));
      this.services.draw(matching(model, rows));
    }
    if (!hosts.hidden) {
      this.hosts.draw(matching(model, model.map.hosts.map(host)));
      this.networks.draw(matching(model, model.map.networks.map(network)));
    }
  }
}

function matching(model, rows) {
  return rows.filter((row) => model.matches(row.join("\n")));
}

function connection(model, edge) {
  const words = Object.keys(edge.reasons);
  const why = words.map((word) => `${word}: ${sentence(model.traffic.reasons, word)}`);
  return [
    model.name(edge.a), model.name(edge.b), edge.path, String(edge.connections),
    amount(edge.to_b), amount(edge.to_a), count(edge.messages), count(edge.retransmits),
    edge.round_trip_ms === null ? "–" : `${edge.round_trip_ms.toFixed(2)} ms`, why.join("; "),
  ];
}

function service(model, each) {
  const names = (keys) => keys.map((key) => model.name(key)).join(", ") || "none";
  const chosen = each.why ? `${names(each.here)} (${each.why})` : names(each.here);
  const here = each.vip ? chosen : "–";
  return [each.name, each.network, each.vip || "–", names(each.tasks), each.balance, here];
}

function host(each) {
  const session = each.own ? "this host" : { true: "yes", false: "no" }[each.session] ?? "–";
  const link = each.transport ? `${each.link}, ${each.transport}` : each.link || "–";
  const sealed = each.encryption ? `encrypted: ${each.encryption}` : "";
  const notes = [each.session_reason, each.link_reason, each.why_not_rdma, sealed];
  const networks = each.networks.join(", ");
  return [each.name, each.address, networks, session, link, notes.filter(Boolean).join("; ")];
}

function network(each) {
  const acceleration = each.acceleration ? "on" : "off";
  const subnets = each.subnets.join(", ");
  return [each.name, each.driver, each.path, acceleration, subnets, each.note];
}
