// The page's only program: send each photo to /v1/classify and draw its labels as bars.
const by = (id) => document.getElementById(id);
const drop = by("drop"), input = by("file"), message = by("message"), results = by("results"), key = by("key");

const element = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const headers = () => (key.value ? { "X-API-Key": key.value } : {});
// What an answer has to do with the key, or nothing; once a key is asked for, there is a line for it.
function keyTrouble({ status }) {
  by("keyline").hidden = status !== 401 && !key.value;
  if (status !== 401) return "";
  return key.value ? "The server does not know this key." : "The server asks for an API key.";
}

function card(file) {
  const node = element("article", "card");
  const figure = element("figure");
  const picture = element("img");
  picture.alt = file.name;
  picture.src = URL.createObjectURL(file);
  picture.onload = () => URL.revokeObjectURL(picture.src);
  picture.onerror = () => picture.remove();
  figure.append(picture, element("figcaption", "", file.name));
  const answer = element("div", "answer");
  answer.append(element("p", "quiet", "Looking…"));
  node.append(figure, answer);
  return { file, node, answer };
}

function bar({ label, probability }) {
  const row = element("li");
  const name = element("span", "label", label);
  // <meter> cannot be styled alike in all browsers.
  const meter = element("div", "meter");
  meter.setAttribute("role", "meter");
  meter.setAttribute("aria-label", label);
  meter.setAttribute("aria-valuenow", String(probability));
  meter.setAttribute("aria-valuemax", "1");
  const fill = element("div");
  fill.style.width = `${100 * probability}%`;
  meter.append(fill);
  const share = element("span", "share", probability >= 0.0005 ? `${(100 * probability).toFixed(1)} %` : "< 0.1 %");
  share.title = String(probability);
  meter.setAttribute("aria-valuetext", share.textContent);
  row.append(name, meter, share);
  return row;
}

// A folder is dropped as a file that cannot be read, which fetch reports as if the server were gone.
const readable = (file) => file.slice(0, 1).arrayBuffer().then(() => true, () => false);

async function classify({ file, answer }) {
  const started = performance.now();
  try {
    if (!(await readable(file))) throw new Error("this is a folder, or a file that the browser cannot read; drop the photos themselves");
    const response = await fetch("/v1/classify", { method: "POST", body: file, headers: headers() });
    if (keyTrouble(response)) throw new Error(keyTrouble(response));
    // Not ours: a proxy's page, say.
    const body = await response.json().catch(() => ({ detail: `the answer is no JSON (status ${response.status}); is something else in front of the server?` }));
    if (!response.ok || !body.images) throw new Error(body.detail);
    const list = element("ol", "bars");
    list.append(...body.images[0].top.map(bar));
    const { width, height } = body.images[0];
    const ms = Math.round(performance.now() - started);
    answer.replaceChildren(list, element("p", "quiet", `${width} × ${height} · ${body.model} version ${body.version} · ${ms} ms`));
  } catch (error) {
    const text = error instanceof TypeError ? "the server does not answer" : error.message;
    answer.replaceChildren(element("p", "error", text));
  }
}

async function classifyAll(files) {
  message.textContent = files.length ? "" : "That is no photo. If it is a link to one, save the photo and drop the file.";
  const cards = files.map(card);
  results.prepend(...cards.map(({ node }) => node));
  for (const each of cards) await classify(each);
}

input.addEventListener("change", () => {
  classifyAll([...input.files]);
  input.value = ""; // or the same photo, chosen again, would be no change
});
for (const type of ["dragenter", "dragover"]) {
  addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  classifyAll([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => { if (event.target !== key) classifyAll([...event.clipboardData.files]); });

by("curl").textContent = `curl -T photo.jpg ${location.origin}/v1/classify`;
async function describe() {
  message.textContent = "";
  const response = await fetch("/v1/models", { headers: headers() });
  const trouble = keyTrouble(response);
  if (key.value && trouble) message.textContent = trouble; // without one, the line asks for it
  if (!response.ok) return;
  const { models } = await response.json();
  const model = models.find((m) => m.default);
  if (model) by("model").textContent = `${model.name} version ${model.version}: ${model.classes} classes, on ${model.device}`;
}
by("keyline").addEventListener("submit", (event) => { event.preventDefault(); describe(); });
key.addEventListener("change", describe);
describe().catch(() => { message.textContent = "The server does not answer."; });
