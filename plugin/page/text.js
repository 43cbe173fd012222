/* Texts and elements. Whatever comes from containers is set as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const CLASSES = {
  "shm": "shm", "rdma": "rdma", "relay": "relay", "overlay+ebpf": "ebpf", "overlay": "overlay",
};

/** The node of all addresses without a name, as in plugin/page_view.py. */
export const UNNAMED = "*";

/** The class of a path. Names of other drivers are no classes. */
export function pathClass(path) {
  return Object.hasOwn(CLASSES, path) ? CLASSES[path] : "other";
}

/** Bytes with a binary unit; "–": not known. */
export function amount(number) {
  if (number === null || number === undefined) return "–";
  let unit = 0;
  while (number >= 1024 && unit < UNITS.length - 1) {
    number /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(number) : number.toFixed(1)} ${UNITS[unit]}`;
}

/** A count per second; "–": not known. */
export function count(number) {
  return number === null || number === undefined ? "–" : String(Math.round(number));
}

/** At most `most` characters, with an ellipsis. */
export function short(text, most) {
  const letters = [...text];
  return letters.length <= most ? text : `${letters.slice(0, most - 1).join("")}…`;
}

/** Set a property of an element, only if it differs: an equal one costs no drawing. */
export function put(element, name, value) {
  if (element[name] !== value) element[name] = value;
}

/** The same for an attribute; null removes it. */
export function attribute(element, name, value) {
  if (value === null) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, String(value));
  }
}

/** A new element of HTML with a text, or with children. */
export function html(name, content = "", className = "") {
  const made = document.createElement(name);
  if (typeof content === "string") made.textContent = content;
  else made.append(...content);
  if (className) made.className = className;
  return made;
}

/** A new element of SVG with attributes. */
export function svg(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text) made.textContent = text;
  return made;
}

/** As many children as `wanted`: `make` makes one, those over it are removed. */
export function children(parent, wanted, make) {
  while (parent.childElementCount > wanted) parent.lastElementChild.remove();
  while (parent.childElementCount < wanted) parent.append(make());
}

/** The sentence for a reason's word. */
export function sentence(reasons, word) {
  return Object.hasOwn(reasons, word) ? reasons[word] : word;
}
