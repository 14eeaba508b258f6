"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const pictures = JSON.parse($("pictures").textContent);
  const tiles = [...document.querySelectorAll("button.picture")];
  const root = document.documentElement, tip = $("tip");

  // A picture that is on the page twice is in the file once.
  for (const kind of ["photo", "mask"]) {
    const sources = new Map();
    for (const tile of tiles) {
      const image = tile.querySelector("." + kind);
      if (image && image.hasAttribute("src")) sources.set(tile.dataset.picture, image.src);
    }
    for (const tile of tiles) {
      const image = tile.querySelector("." + kind);
      if (image && !image.hasAttribute("src")) image.src = sources.get(tile.dataset.picture) || "";
    }
  }

  // ── Light and dark ──
  const dark = matchMedia("(prefers-color-scheme: dark)");
  $("theme").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });

  // ── Masks on, off, and how strong ──
  const masks = $("masks"), opacity = $("opacity");
  const showMasks = (on) => {
    document.body.classList.toggle("bare", !on);
    if (masks) masks.checked = on;
  };
  const toggleMasks = () => showMasks(document.body.classList.contains("bare"));
  if (masks) masks.addEventListener("change", () => showMasks(masks.checked));
  if (opacity) opacity.addEventListener("input", () => root.style.setProperty("--mask-opacity", opacity.value / 100));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input:not([type=checkbox]):not([type=range]), textarea");
    if (event.key === "m" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) toggleMasks();
  });

  // ── The tip ──
  const tell = (text, event) => {
    if (!text) { tip.hidden = true; return; }
    tip.textContent = text;
    // A modal dialog lies above all else: the tip has to be in it.
    const home = viewer.open ? viewer : document.body;
    if (tip.parentNode !== home) home.append(tip);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const top = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = Math.max(8, top) + "px";
  };

  // A finger moves nowhere and is gone at once: what it touched is told until the next touch.
  const pointed = (element, says) => {
    element.addEventListener("pointermove", (event) => tell(says(event), event));
    element.addEventListener("pointerdown", (event) => { if (event.pointerType === "touch") tell(says(event), event); });
    element.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") tell("", event); });
  };
  document.addEventListener("pointerdown", () => { tip.hidden = true; }, true);

  // Charts: Vega has written what each mark says into its aria-label.
  for (const chart of document.querySelectorAll("svg.chart")) {
    pointed(chart, (event) => {
      const mark = event.target.closest("[role=graphics-symbol][aria-label]:not([aria-roledescription=axis]):not([aria-roledescription=legend])");
      return mark ? mark.getAttribute("aria-label") : "";
    });
  }

  // Pictures: the label map says what lies under the pointer.
  const maps = new Map();
  const labelMap = (key) => {
    if (!maps.has(key)) {
      maps.set(key, null);
      const picture = pictures[key];
      if (picture) {
        const image = new Image();
        image.onload = () => {
          const canvas = document.createElement("canvas");
          canvas.width = image.naturalWidth;
          canvas.height = image.naturalHeight;
          const pen = canvas.getContext("2d", { willReadFrequently: true });
          pen.drawImage(image, 0, 0);
          maps.set(key, { width: canvas.width, height: canvas.height, pixels: pen.getImageData(0, 0, canvas.width, canvas.height).data });
        };
        image.src = picture.labels;
      }
    }
    return maps.get(key);
  };
  const under = (key, photo, event) => {
    const map = labelMap(key);
    if (!map || !photo.naturalWidth) return "";
    const box = photo.getBoundingClientRect();
    const scale = Math.min(box.width / photo.naturalWidth, box.height / photo.naturalHeight);
    const width = photo.naturalWidth * scale, height = photo.naturalHeight * scale;
    const x = (event.clientX - box.left - (box.width - width) / 2) / width;
    const y = (event.clientY - box.top - (box.height - height) / 2) / height;
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return "";
    const at = 4 * (Math.floor(y * map.height) * map.width + Math.floor(x * map.width));
    const label = map.pixels[at] + 256 * map.pixels[at + 1];
    const found = label && pictures[key].names[label - 1];
    if (!found) return "";
    return found[1] === null ? found[0] : found[0] + " · " + found[1].toFixed(2);
  };
  const follow = (element, key) => {
    element.addEventListener("pointerenter", () => labelMap(key()));
    pointed(element, (event) => under(key(), element.querySelector(".photo"), event));
  };
  for (const tile of tiles) follow(tile, () => tile.dataset.picture);

  // ── The viewer ──
  const viewer = $("viewer"), room = $("room"), big = $("big");
  let current = 0, zoom = 1;
  const resize = () => {
    const photo = big.querySelector(".photo");
    if (!photo.naturalWidth) return;
    const fit = Math.min(room.clientWidth / photo.naturalWidth, room.clientHeight / photo.naturalHeight);
    big.style.width = Math.floor(photo.naturalWidth * fit * zoom) + "px";
    big.style.height = Math.floor(photo.naturalHeight * fit * zoom) + "px";
    big.style.cursor = zoom > 1 ? "zoom-out" : "zoom-in";
  };
  const zoomTo = (level, x = 0.5, y = 0.5) => {
    zoom = Math.min(8, Math.max(1, level));
    resize();
    room.scrollLeft = big.offsetWidth * x - room.clientWidth / 2;
    room.scrollTop = big.offsetHeight * y - room.clientHeight / 2;
  };
  // What a pointer would find, for those who use none: each class, how often, and its mean score.
  const inWords = (key) => {
    const found = new Map();
    for (const [name, score] of pictures[key] ? pictures[key].names : []) {
      if (!name) continue;
      const one = found.get(name) || { number: 0, sum: 0, scored: 0 };
      one.number += 1;
      if (score !== null) { one.sum += score; one.scored += 1; }
      found.set(name, one);
    }
    return [...found].map(([name, one]) =>
      (one.number > 1 ? one.number + " × " : "") + name + (one.scored ? " " + (one.sum / one.scored).toFixed(2) : "")).join(" · ");
  };
  const show = (index) => {
    current = (index + tiles.length) % tiles.length;
    const tile = tiles[current], mask = tile.querySelector(".mask");
    const photo = big.querySelector(".photo"), layer = big.querySelector(".mask");
    photo.alt = tile.querySelector(".photo").alt;
    photo.onload = () => zoomTo(1);
    photo.src = tile.querySelector(".photo").src;
    layer.hidden = !mask;
    if (mask) layer.src = mask.src;
    $("viewer-name").textContent = tile.dataset.name;
    $("viewer-caption").textContent = tile.dataset.caption;
    $("viewer-uri").textContent = tile.dataset.uri;
    $("viewer-names").textContent = inWords(tile.dataset.picture);
    labelMap(tile.dataset.picture);
    tip.hidden = true;
  };
  tiles.forEach((tile, index) => tile.addEventListener("click", () => {
    viewer.showModal();
    show(index);
    room.focus();
  }));
  follow(big, () => tiles[current].dataset.picture);
  big.addEventListener("click", (event) => {
    const box = big.getBoundingClientRect();
    zoomTo(zoom > 1 ? 1 : 3, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => {
    tip.hidden = true;
    document.body.append(tip);
    tiles[current].focus();
  });
  viewer.addEventListener("keydown", (event) => {
    if (zoom === 1 && event.key === "ArrowRight") show(current + 1);
    else if (zoom === 1 && event.key === "ArrowLeft") show(current - 1);
    else if (event.key === "+" || event.key === "=") zoomTo(zoom * 1.6);
    else if (event.key === "-") zoomTo(zoom / 1.6);
    else return;
    event.preventDefault();
  });
  $("back").addEventListener("click", () => show(current - 1));
  $("next").addEventListener("click", () => show(current + 1));
  $("closer").addEventListener("click", () => zoomTo(zoom * 1.6));
  $("farther").addEventListener("click", () => zoomTo(zoom / 1.6));
  $("hide").addEventListener("click", toggleMasks);
  $("close").addEventListener("click", () => viewer.close());
  addEventListener("resize", () => { if (viewer.open) resize(); });
})();
