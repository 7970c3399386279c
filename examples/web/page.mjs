// The page: files in, a picture with a slider out. The network itself is in network.mjs.

import { openNetwork, reason, toPicture, upscale } from "./network.mjs";

const element = (id) => document.getElementById(id);
const LIMIT = 2 ** 31; // bytes that the largest tensor may have in a browser's memory of 4 GB
const VALUES_PER_PIXEL = 256; // of the largest tensor of a RCAN or SRDenseNet of full size

let opened = null; // the network, until another file or backend is chosen
let turn = 0; // a choice that is made while another is computed replaces it

for (const id of ["network", "backend"]) {
  element(id).addEventListener("change", () => {
    opened = null;
    run();
  });
}
element("picture").addEventListener("change", run);
element("slider").addEventListener("input", ({ target }) => {
  element("compare").style.setProperty("--cut", `${target.value}%`);
});

async function run() {
  const mine = ++turn;
  const [networkFile] = element("network").files;
  const [pictureFile] = element("picture").files;
  element("result").hidden = true;
  report("Choose a network and a picture.", opened?.notes);
  if (!networkFile || !pictureFile) return;
  try {
    report(`Opening ${networkFile.name} …`);
    const bytes = new Uint8Array(await networkFile.arrayBuffer());
    const network = opened ?? (await openNetwork(bytes, element("backend").value));
    const picture = await readPicture(pictureFile);
    if (mine !== turn) return;
    opened = network;
    report(`Upscaling ${picture.width} x ${picture.height} on ${label(network)} …`, network.notes);
    const result = await upscale(network.session, picture);
    if (mine === turn) show(picture, result, network);
  } catch (error) {
    if (mine === turn) report(`Failed: ${reason(error)}.`, [], true);
  }
}

async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${file.name} is not a picture that this browser reads`);
  }
  if (bitmap.width * bitmap.height * VALUES_PER_PIXEL * 4 > LIMIT) {
    const megapixels = (LIMIT / VALUES_PER_PIXEL / 4 / 1e6).toFixed(1);
    throw new Error(`${bitmap.width} x ${bitmap.height} is too large for a browser; at most ${megapixels} megapixels`);
  }
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

function show(picture, result, network) {
  const after = element("after");
  [after.width, after.height] = [result.width, result.height];
  after.getContext("2d").putImageData(toPicture(result), 0, 0);
  const before = element("before");
  [before.width, before.height] = [result.width, result.height];
  const small = new OffscreenCanvas(picture.width, picture.height);
  small.getContext("2d").putImageData(picture, 0, 0);
  const context = before.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, result.width, result.height);
  element("caption").textContent = `${picture.width} x ${picture.height} to ${result.width} x ${result.height}`;
  after.toBlob((blob) => (element("save").href = URL.createObjectURL(blob)));
  element("result").hidden = false;
  report(`Done in ${(result.milliseconds / 1000).toFixed(2)} s on ${label(network)}.`, network.notes);
}

function label({ backend, device }) {
  return `${backend === "webgpu" ? "WebGPU" : "WebAssembly"} (${device})`;
}

function report(text, notes = [], failed = false) {
  element("status").textContent = text;
  element("status").classList.toggle("failed", failed);
  element("notes").replaceChildren(
    ...(notes ?? []).map((note) => Object.assign(document.createElement("li"), { textContent: note })),
  );
}
