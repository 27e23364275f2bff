// What a reader may do with the page; without this script it is as complete: tables sort by a click on a head, any two pictures
// of an image are compared under a slider, pictures of an image zoom together, and methods can be hidden.
"use strict";

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const button = (text, label, action) => {
  const made = make("button", { type: "button", "aria-label": label, title: label }, text);
  made.addEventListener("click", action);
  return made;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// Tables ---------------------------------------------------------------------------------------------------------------

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    const sorter = make("button", { type: "button" }, ...head.childNodes);
    head.append(sorter);
    sorter.addEventListener("click", () => {
      const first = head.classList.contains("text") ? "ascending" : "descending";
      const other = { ascending: "descending", descending: "ascending" };
      const order = other[head.getAttribute("aria-sort")] ?? first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const known = (value) => value !== "" && value !== "–";
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (known(x) !== known(y)) return known(x) ? -1 : 1;
        const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
        const sign = numbers ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
        return order === "descending" ? -sign : sign;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}

// Pictures of one image: a slider over any two, one zoom for all ----------------------------------------------------------

for (const row of document.querySelectorAll(".image")) {
  const tiles = [...row.querySelectorAll(".tile")].filter((tile) => tile.querySelector(".picture img"));
  if (!tiles.length) continue;
  const sources = tiles.map((tile) => [tile.dataset.name, tile.querySelector(".picture img")]);
  const zoom = { scale: 1, x: 50, y: 50 };
  const show = () => {
    for (const image of row.querySelectorAll(".picture img")) {
      image.style.transformOrigin = `${zoom.x}% ${zoom.y}%`;
      image.style.transform = zoom.scale > 1 ? `scale(${zoom.scale})` : "";
    }
  };
  const magnify = (factor) => {
    zoom.scale = clamp(zoom.scale * factor, 1, 16);
    show();
  };
  // the picture's own place under the pointer stays there
  const aim = (event, box) => {
    const at = box.getBoundingClientRect();
    const inside = [(event.clientX - at.left) / at.width, (event.clientY - at.top) / at.height];
    const place = (p, origin) => clamp(100 * ((p - origin / 100) / zoom.scale + origin / 100), 0, 100);
    [zoom.x, zoom.y] = [place(inside[0], zoom.x), place(inside[1], zoom.y)];
  };
  for (const box of row.querySelectorAll(".tile .picture")) {
    box.title = "click: zoom in here; with shift: zoom out";
    box.addEventListener("click", (event) => {
      aim(event, box);
      magnify(event.shiftKey ? 0.5 : 2);
    });
  }

  const select = (label, chosen) => {
    const list = make("select", { "aria-label": label });
    sources.forEach(([name], i) => list.append(make("option", { value: i }, name)));
    list.selectedIndex = chosen;
    list.addEventListener("change", update);
    return list;
  };
  const [left, right] = [make("img", { alt: "", draggable: "false" }), make("img", { alt: "", draggable: "false" })];
  const line = make("span", { class: "divider" });
  const stage = make("div", { class: "stage picture", tabindex: "0", role: "slider", "aria-label": "divider between two pictures",
    "aria-valuemin": "0", "aria-valuemax": "100" }, left, make("div", { class: "over" }, right), line);
  const over = stage.querySelector(".over");
  const truth = tiles.findIndex((tile) => !tile.dataset.method);
  const best = tiles.findIndex((tile) => tile.querySelector(".best"));
  const first = truth >= 0 ? truth : 0;
  const lists = [select("left picture", first), select("right picture", best >= 0 ? best : sources.length - 1)];
  let place = 50;
  const move = (to) => {
    place = clamp(to, 0, 100);
    over.style.clipPath = `inset(0 0 0 ${place}%)`;
    line.style.left = `${place}%`;
    stage.setAttribute("aria-valuenow", Math.round(place));
    stage.setAttribute("aria-valuetext", `${Math.round(place)} % ${sources[lists[0].selectedIndex][0]}`);
  };
  function update() {
    [left, right].forEach((image, i) => {
      image.src = sources[lists[i].selectedIndex][1].src;
      image.alt = sources[lists[i].selectedIndex][1].alt;
    });
    move(place);
  }
  const drag = (event) => {
    const at = stage.getBoundingClientRect();
    move((100 * (event.clientX - at.left)) / at.width);
  };
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    drag(event);
  });
  stage.addEventListener("pointermove", (event) => stage.hasPointerCapture(event.pointerId) && drag(event));
  stage.addEventListener("dblclick", (event) => {
    aim(event, stage);
    magnify(2);
  });
  stage.addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 10 : 2;
    const keys = { ArrowLeft: () => move(place - step), ArrowRight: () => move(place + step), Home: () => move(0), End: () => move(100),
      "+": () => magnify(2), "-": () => magnify(0.5), 0: () => magnify(0) };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  const zooms = make("span", { class: "zooms" }, button("−", "zoom out", () => magnify(0.5)), button("+", "zoom in", () => magnify(2)),
    button("1:1", "whole picture", () => magnify(0)));
  const swap = button("⇄", "swap", () => {
    [lists[0].selectedIndex, lists[1].selectedIndex] = [lists[1].selectedIndex, lists[0].selectedIndex];
    update();
  });
  const panel = make("div", { class: "compare" }, make("div", { class: "choices" }, lists[0], swap, lists[1], zooms), stage);
  row.querySelector(".grid").before(panel);
  update();
}

// Methods --------------------------------------------------------------------------------------------------------------

const marked = [...document.querySelectorAll("[data-method]")].filter((element) => element.dataset.method);
const methods = [...new Set(marked.map((element) => element.dataset.method))];
const place = document.getElementById("filter");
if (place && methods.length > 2) {
  const boxes = methods.map((name) => {
    const box = make("input", { type: "checkbox", value: name });
    box.checked = true;
    return box;
  });
  const filter = () => {
    const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => box.value));
    for (const element of marked) element.classList.toggle("off", hidden.has(element.dataset.method));
  };
  const all = (value) => () => {
    boxes.forEach((box) => (box.checked = value));
    filter();
  };
  boxes.forEach((box) => box.addEventListener("change", filter));
  const choices = make("fieldset", {}, make("legend", {}, "methods shown"), ...boxes.map((box) => make("label", {}, box, " ", box.value)),
    button("all", "show all methods", all(true)), button("none", "hide all methods", all(false)));
  place.append(make("details", {}, make("summary", {}, `Show or hide methods (${methods.length})`), choices));
}
