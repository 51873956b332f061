// The page "Predict in a browser": a visitor draws or chooses a picture, and two ONNX files predict.
// They are in the folder of this script, with ONNX Runtime Web. Nothing is loaded before the first picture.
const MODELS = ["student", "teacher"];
const ROUNDS = 20;
const at = (file) => new URL(file, import.meta.url).href;

const place = document.getElementById("kd-predict");
place.innerHTML = `<canvas width="128" height="128" aria-label="Draw a digit here"></canvas>
  <p><button type="button">Clear</button> <input type="file" accept="image/*" aria-label="Picture of a digit"></p>
  <table><thead><tr><th>model</th><th>predicts</th><th>probability</th><th>ms</th><th>kB</th><th>accuracy</th></tr></thead>
  <tbody>${MODELS.map((n) => `<tr id="kd-${n}"><td>${n}</td>${"<td>–</td>".repeat(5)}</tr>`).join("")}</tbody></table>
  <p role="status"></p>`;
const find = (selector) => place.querySelector(selector);
const canvas = find("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
const say = (text) => (find("[role=status]").textContent = text);

let loading;
const load = () => (loading ??= (async () => {
  say("Loading the runtime …");
  const ort = await import(at("onnxruntime/ort.wasm.bundle.min.mjs"));
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  const open = async (name) => {
    const bytes = await (await fetch(at(`${name}.onnx`))).arrayBuffer();
    const info = await (await fetch(at(`${name}.json`))).json();
    return { name, info, kb: bytes.byteLength / 1000, session: await ort.InferenceSession.create(bytes) };
  };
  const models = [];
  for (const name of MODELS) models.push(await open(name));
  say("");
  return { ort, models };
})());

// Pixels of a picture as the files take them: uint8 (1, height, width, 3)
const rgb = ({ data, width, height }) => {
  const pixels = new Uint8Array(width * height * 3);
  for (let i = 0; i < pixels.length; i++) pixels[i] = data[4 * Math.floor(i / 3) + (i % 3)];
  return [pixels, [1, height, width, 3]];
};

// Milliseconds of each model, the median of rounds in which they take turns
const measure = async (models, image) => {
  const spent = models.map(() => []);
  for (let r = 0; r < ROUNDS; r++)
    for (const [i, m] of models.entries()) {
      const start = performance.now();
      await m.session.run({ image });
      spent[i].push(performance.now() - start);
    }
  return spent.map((times) => times.sort((a, b) => a - b)[ROUNDS / 2]);
};

const predict = async (pixels) => {
  const { ort, models } = await load();
  const image = new ort.Tensor("uint8", ...rgb(pixels));
  for (const m of models) m.found = (await m.session.run({ image })).probabilities.data;
  const ms = await measure(models, image);
  models.forEach((m, i) => {
    const p = Math.max(...m.found), name = m.info.classes[m.found.indexOf(p)];
    const cells = [name, p.toFixed(3), ms[i].toFixed(2), m.kb.toFixed(0), m.info.scores.accuracy.toFixed(3)];
    const row = find(`#kd-${m.name}`);
    cells.forEach((text, k) => (row.cells[k + 1].textContent = text));
  });
};
const attempt = (pixels) => predict(pixels).catch((e) => say(`This did not work: ${e.message}`));

const clear = () => {
  context.fillStyle = "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
};
const show = async (file) => {
  const picture = await createImageBitmap(file);
  const own = new OffscreenCanvas(picture.width, picture.height).getContext("2d");
  own.drawImage(picture, 0, 0);
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  attempt(own.getImageData(0, 0, picture.width, picture.height));
};

// Drawing: a round brush, as wide as a stroke of the scanned digits
const point = (e) => [e.offsetX * canvas.width / canvas.clientWidth, e.offsetY * canvas.height / canvas.clientHeight];
Object.assign(context, { lineWidth: 22, lineCap: "round", lineJoin: "round", strokeStyle: "white" });
let last = null;
canvas.addEventListener("pointerdown", (e) => {
  last = point(e);
  canvas.setPointerCapture(e.pointerId);
});
canvas.addEventListener("pointermove", (e) => {
  if (!last) return;
  context.beginPath();
  context.moveTo(...last);
  context.lineTo(...(last = point(e)));
  context.stroke();
});
canvas.addEventListener("pointerup", () => {
  last = null;
  attempt(context.getImageData(0, 0, canvas.width, canvas.height));
});
canvas.addEventListener("dragover", (e) => e.preventDefault());
canvas.addEventListener("drop", (e) => {
  e.preventDefault();
  show(e.dataTransfer.files[0]);
});
find("input").addEventListener("change", (e) => show(e.target.files[0]));
find("button").addEventListener("click", clear);
clear();
