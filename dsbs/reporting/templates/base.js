"use strict";
// Shared by the pages: elements whose text comes from data, as text and never as markup.
const at = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString("en");

// Show control characters, which have no glyph, as escapes.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

// An element with children: strings become text, never markup.
function element(name, properties, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key in node && key !== "dir") node[key] = value; else node.setAttribute(key, value);
  }
  node.append(...children.map((child) => (typeof child === "string" ? visible(child) : child)));
  return node;
}
