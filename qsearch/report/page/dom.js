"use strict";
// Elements and words. Whatever comes from the study reaches the page as text or as an attribute's value, never as markup.

function put(parent, name, attributes, ...children) {
  const drawn = parent instanceof SVGElement || name === "svg";
  const made = drawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  parent.append(made);
  return made;
}

function byId(name) {
  return document.getElementById(name);
}

function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return (Number(text) === 0 ? "" : value < 0 ? "\u2212" : "+") + text;
}

function bytesText(size) {
  let value = size;
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 1000) return (unit === "B" || value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)))) + " " + unit;
    value /= 1000;
  }
  return String(Number(value.toPrecision(3))) + " GB";
}

function signedBytes(size) {
  return size === 0 ? "0 B" : (size < 0 ? "\u2212" : "+") + bytesText(Math.abs(size));
}

// A long name without its middle: names of layers are told apart by their ends.
function middle(text, most) {
  if (text.length <= most) return text;
  const head = Math.floor(most / 3);
  return text.slice(0, head) + "\u2026" + text.slice(text.length - (most - 1 - head));
}

// Black or white, whichever is read better on a colour such as #0072B2.
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

// Round values between two ends, at most so many.
function ticksBetween(low, high, most) {
  const rough = (high - low) / most;
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * magnitude).find((size) => size >= rough * (1 - 1e-9));
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(index * step);
  return found;
}

// The ends of an axis: all values with a margin, of a single value some of itself.
function endsOf(values, margin) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = high > low ? (high - low) * margin : Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

function placer([low, high], [start, end]) {
  return (value) => start + ((value - low) / (high - low)) * (end - start);
}
