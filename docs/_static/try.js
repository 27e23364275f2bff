// The page "Try it": measure a picture, restore it with an exported network, compare. Nothing leaves the machine.
"use strict";
(() => {
  const base = document.currentScript.src.replace(/try\.js.*$/, "try/");
  const tasks = {
    denoise: { model: "denoiser.onnx", sample: "photo.png", side: 128 },
    inpaint: { model: "inpainter.onnx", sample: "portrait.png", side: 64 },
  };
  const at = (id) => document.getElementById(`try-${id}`);
  const [before, after, over] = ["before", "after", "over"].map(at);
  const sessions = {};
  let task = "denoise";
  let clean, hidden, measured; // (3, H, W) in [0, 1]; (H, W), 1 where it is painted over; (3, H, W)

  const side = () => tasks[task].side;
  const sigma = () => Number(at("sigma").value);

  function show(canvas, x) {
    const n = side();
    canvas.width = canvas.height = n;
    const picture = new ImageData(n, n);
    for (let i = 0; i < n * n; i++) {
      for (let c = 0; c < 3; c++) picture.data[4 * i + c] = 255 * Math.min(1, Math.max(0, x[c * n * n + i])) + 0.5;
      picture.data[4 * i + 3] = 255;
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  function gaussian(n) { // the same noise every time: Box and Muller on mulberry32
    let state = 0;
    const uniform = () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return Float32Array.from({ length: n }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
  }

  function measure() {
    const n = side() ** 2;
    const noise = task === "denoise" ? gaussian(3 * n) : null;
    measured = clean.map((value, i) => (noise ? value + sigma() * noise[i] : value * (1 - hidden[i % n])));
    show(before, measured);
    show(over, measured);
    after.closest("figure").hidden = true; // until it is restored
    document.querySelector("#try-level output").textContent = sigma().toFixed(2);
  }

  async function load(source) {
    const picture = await createImageBitmap(await (await fetch(source)).blob());
    const n = side();
    const square = Math.min(picture.width, picture.height);
    const canvas = Object.assign(document.createElement("canvas"), { width: n, height: n });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    const [left, top] = [(picture.width - square) / 2, (picture.height - square) / 2];
    context.drawImage(picture, left, top, square, square, 0, 0, n, n);
    const pixels = context.getImageData(0, 0, n, n).data;
    clean = Float32Array.from({ length: 3 * n * n }, (_, i) => pixels[4 * (i % (n * n)) + Math.floor(i / (n * n))] / 255);
    hidden = new Float32Array(n * n);
    if (task === "inpaint") paint(n * 0.5, n * 0.42, n * 0.12);
    measure();
  }

  function paint(x, y, radius) {
    const n = side();
    for (let i = 0; i < n * n; i++) if (Math.hypot((i % n) + 0.5 - x, Math.floor(i / n) + 0.5 - y) < radius) hidden[i] = 1;
  }

  async function session() {
    if (!window.ort) {
      await new Promise((resolve, reject) => {
        const script = Object.assign(document.createElement("script"), { src: `${base}ort.wasm.min.js`, onload: resolve, onerror: reject });
        document.head.append(script);
      });
      ort.env.wasm.wasmPaths = base;
      ort.env.wasm.numThreads = 1;
    }
    sessions[task] ??= await ort.InferenceSession.create(base + tasks[task].model);
    return sessions[task];
  }

  async function restore() {
    at("run").disabled = true;
    at("note").textContent = "working ...";
    try {
      const [network, n] = [await session(), side()];
      const tensor = (values, ...shape) => new ort.Tensor("float32", values, shape);
      const started = performance.now();
      const mask = Float32Array.from({ length: 3 * n * n }, (_, i) => 1 - hidden[i % (n * n)]);
      const operator = task === "denoise" ? { sigma: tensor([sigma()]) } : { mask: tensor(mask, 1, 3, n, n) };
      const result = await network.run({ y: tensor(measured, 1, 3, n, n), ...operator });
      const restored = Object.values(result)[0].data;
      show(after, restored);
      after.closest("figure").hidden = false;
      const error = clean.reduce((sum, value, i) => sum + (value - Math.min(1, Math.max(0, restored[i]))) ** 2, 0) / clean.length;
      at("note").textContent = `${(-10 * Math.log10(error)).toFixed(2)} dB, ${((performance.now() - started) / 1000).toFixed(1)} s`;
      window.flowproxTry = { measured: [...measured], mask: [...mask], sigma: sigma(), restored: [...restored] };
    } catch (error) {
      at("note").textContent = `The network could not be loaded (${error.message ?? "not part of this build"}).`;
    }
    at("run").disabled = false;
  }

  before.addEventListener("pointermove", (event) => {
    if (task !== "inpaint" || !event.buttons) return;
    const box = before.getBoundingClientRect();
    paint(((event.clientX - box.left) / box.width) * side(), ((event.clientY - box.top) / box.height) * side(), 3);
    measure();
  });
  at("clear").addEventListener("click", () => { hidden.fill(0); measure(); });
  at("sigma").addEventListener("input", measure);
  at("slider").addEventListener("input", () => { over.style.clipPath = `inset(0 ${100 - at("slider").value}% 0 0)`; });
  at("file").addEventListener("change", () => { if (at("file").files.length) load(URL.createObjectURL(at("file").files[0])); });
  at("run").addEventListener("click", restore);
  for (const choice of document.querySelectorAll("#try [name=task]")) {
    choice.addEventListener("change", () => {
      task = choice.value;
      at("level").hidden = task !== "denoise";
      at("clear").hidden = task === "denoise";
      at("file").value = "";
      load(base + tasks[task].sample);
    });
  }
  over.style.clipPath = "inset(0 100% 0 0)";
  load(base + tasks[task].sample).catch(() => { at("note").textContent = "This build of the site has no networks: python docs/make_try.py"; });
})();
