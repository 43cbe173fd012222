/* Where hosts, services and containers are drawn. It depends on the map alone, so nothing moves
   while connections change, and all browsers draw the same. */

import { UNNAMED } from "./text.js";

const GAP = 10;
const HEAD = 24;
const PILL = { width: 132, height: 24, gap: 6 };
const DOT = { width: 13, height: 13, gap: 4 };
const LABELS = 60;
const MOST_IN_A_GROUP = 10;
const WIDTH = 1000;
/* Of the other hosts' boxes, and between them and this host's. */
const RIGHT = 332;
const BETWEEN = 90;
const SERVICE = { width: 150, height: 36, gap: 8 };

/** Boxes of hosts and groups, and the place of each node by its key. */
export function layout(map) {
  const byHost = new Map([[map.host, []]]);
  for (const host of map.hosts) byHost.set(host.name, []);
  for (const container of map.containers) {
    if (!byHost.has(container.host)) byHost.set(container.host, []);
    byHost.get(container.host).push(container);
  }
  const others = [...byHost.keys()].filter((name) => name !== map.host);
  const left = WIDTH - RIGHT - BETWEEN;
  const labels = map.containers.length <= LABELS;
  const made = {
    hosts: [], groups: [], nodes: new Map(), width: WIDTH, height: 0, crowded: !labels,
  };
  const top = placeServices(made, map.services.filter((service) => service.vip));
  const space = { x: 1, y: top, width: left };
  const bottom = place(made, map, map.host, byHost.get(map.host), space, labels);
  let y = top;
  for (const name of others) {
    const beside = { x: WIDTH - RIGHT - 1, y, width: RIGHT };
    y = place(made, map, name, byHost.get(name), beside, labels) + GAP;
  }
  const unnamed = { x: WIDTH - RIGHT - 1, y, width: 168, height: 30 };
  made.nodes.set(UNNAMED, { ...unnamed, label: "addresses without a name", kind: "unnamed" });
  made.height = Math.max(bottom, y + unnamed.height) + 2;
  return made;
}

/** One host's box; answers where it ends. */
function place(made, map, name, containers, space, labels) {
  const groups = new Map();
  for (const container of containers) {
    if (!groups.has(container.service)) groups.set(container.service, []);
    groups.get(container.service).push(container);
  }
  let x = space.x + GAP;
  let y = space.y + HEAD + 4;
  let row = 0;
  for (const service of [...groups.keys()].sort()) {
    const members = groups.get(service);
    const shape = labels && members.length <= MOST_IN_A_GROUP ? PILL : DOT;
    const size = measure(service, members.length, shape, space.width - 2 * GAP);
    if (x + size.width > space.x + space.width - GAP && x > space.x + GAP) {
      x = space.x + GAP;
      y += row + GAP;
      row = 0;
    }
    const group = { key: `${name}/${service}`, label: service || "no service", x, y, ...size };
    made.groups.push(group);
    fill(made, group, members, shape, size.columns);
    x += size.width + GAP;
    row = Math.max(row, size.height);
  }
  const height = Math.max(y + row + GAP - space.y, HEAD + 14);
  const own = name === map.host;
  const title = own ? `${name} (this host)` : name || "host not known";
  const { x: left, y: top, width } = space;
  made.hosts.push({ key: name, label: title, own, x: left, y: top, width, height });
  return space.y + height;
}

function measure(label, number, shape, most) {
  const cell = shape.width + shape.gap;
  const wish = shape === PILL ? Math.ceil(number / 5) : Math.ceil(Math.sqrt(number * 2));
  const columns = Math.max(1, Math.min(wish, Math.floor((most - 16 + shape.gap) / cell)));
  const rows = Math.ceil(number / columns);
  const title = Math.min(24, [...label].length || 10) * 7 + 16;
  return {
    columns,
    width: Math.min(most, Math.max(columns * cell - shape.gap + 16, title)),
    height: rows * (shape.height + shape.gap) - shape.gap + HEAD + 6,
  };
}

function fill(made, group, members, shape, columns) {
  members.forEach((container, index) => {
    made.nodes.set(container.key, {
      x: group.x + 8 + (index % columns) * (shape.width + shape.gap),
      y: group.y + HEAD + Math.floor(index / columns) * (shape.height + shape.gap),
      width: shape.width,
      height: shape.height,
      label: shape === PILL ? container.name : "",
      kind: "container",
    });
  });
}

/** In rows above the hosts; answers where they end. */
function placeServices(made, services) {
  const cell = SERVICE.width + SERVICE.gap;
  const columns = Math.floor((WIDTH + SERVICE.gap) / cell);
  services.forEach((service, index) => {
    made.nodes.set(service.key, {
      x: 1 + (index % columns) * cell,
      y: 1 + Math.floor(index / columns) * (SERVICE.height + SERVICE.gap),
      width: SERVICE.width,
      height: SERVICE.height,
      label: service.name,
      below: `VIP ${service.vip}`,
      kind: "service",
    });
  });
  const rows = Math.ceil(services.length / columns);
  return rows ? 1 + rows * (SERVICE.height + SERVICE.gap) + 2 * GAP : 1;
}
