// Graphs of srdeploy on onnxruntime-web: which backend really runs one, and pictures through it.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.webgpu.min.mjs";

const THREADS = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
ort.env.wasm.numThreads = THREADS; // by itself it takes half of the cores, four at most
ort.env.logLevel = "fatal"; // what matters is in `notes`, not in the console

/**
 * Open a graph.
 *
 * By itself onnxruntime-web computes on the CPU, without an error, when WebGPU is missing, and also every operator that has
 * no WebGPU kernel. Here WebGPU computes the whole graph or nothing, and why it does not is said.
 *
 * @param {Uint8Array} bytes the ONNX file.
 * @param {"auto"|"webgpu"|"wasm"} wanted "auto" takes WebGPU where it can compute the graph.
 * @returns {Promise<{session: object, backend: "webgpu"|"wasm", device: string, notes: string[]}>} `notes` has a sentence
 *   for everything that makes it slower than wanted.
 * @throws {Error} the file is not a graph that takes pictures, or "webgpu" was wanted and cannot compute it.
 */
export async function openNetwork(bytes, wanted = "auto") {
  const notes = [];
  if (wanted !== "wasm") {
    try {
      const device = await webgpuDevice(notes);
      const session = await openOnWebgpu(bytes);
      return { session: checked(session), backend: "webgpu", device, notes };
    } catch (error) {
      if (wanted === "webgpu") throw new Error(reason(error));
      notes.splice(0, notes.length, `WebGPU is not used: ${reason(error)}.`);
    }
  }
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  if (!self.crossOriginIsolated) {
    notes.push("One core only: the server of this page does not send the headers COOP and COEP (serve.py does).");
  }
  return { session: checked(session), backend: "wasm", device: THREADS === 1 ? "1 thread" : `${THREADS} threads`, notes };
}

/** Return what an error of onnxruntime says, without its codes and source files. */
export function reason(error) {
  const text = error.message.replace(/^.*ERROR_MESSAGE: /s, "").replace(/^\S+\.cc:\d+ (\w+ )?/, "");
  return text.trim().replace(/\.$/, "").slice(0, 300);
}

/**
 * Upscale one picture.
 *
 * @param {object} session of `openNetwork`.
 * @param {ImageData} picture RGBA, 8 bits; alpha is not used.
 * @returns {Promise<{values: Float32Array, width: number, height: number, milliseconds: number}>} `values`: planes R, G,
 *   B in 0..1, not clamped.
 */
export async function upscale(session, picture) {
  const { width, height, data } = picture;
  const pixels = width * height;
  const planes = new Float32Array(3 * pixels);
  for (let i = 0; i < pixels; i++) {
    for (let plane = 0; plane < 3; plane++) planes[plane * pixels + i] = data[4 * i + plane] / 255;
  }
  const start = performance.now();
  const feeds = { [session.inputNames[0]]: new ort.Tensor("float32", planes, [1, 3, height, width]) };
  const output = (await session.run(feeds))[session.outputNames[0]];
  const values = await output.getData();
  const [, , largeHeight, largeWidth] = output.dims;
  return { values, width: largeWidth, height: largeHeight, milliseconds: performance.now() - start };
}

/** Clamp and round the values of `upscale` into a picture. */
export function toPicture({ values, width, height }) {
  const pixels = width * height;
  const picture = new ImageData(width, height);
  for (let i = 0; i < pixels; i++) {
    for (let plane = 0; plane < 3; plane++) picture.data[4 * i + plane] = values[plane * pixels + i] * 255;
    picture.data[4 * i + 3] = 255; // the array clamps, and rounds half to even
  }
  return picture;
}

/** Return a name of the GPU that WebGPU uses. */
async function webgpuDevice(notes) {
  if (!navigator.gpu) throw new Error("this browser or page has no WebGPU (it needs https or localhost)");
  const adapter = await navigator.gpu.requestAdapter();
  if (!adapter) throw new Error("WebGPU found no GPU");
  const { vendor, architecture, description } = adapter.info;
  const name = description || [vendor, architecture].filter(Boolean).join(" ") || "unnamed GPU";
  if (adapter.info.isFallbackAdapter || adapter.isFallbackAdapter || /swiftshader|llvmpipe|basic render/i.test(name)) {
    notes.push(`${name} is no GPU: WebGPU is computed on the CPU, and slower than WebAssembly.`);
  }
  return name;
}

async function openOnWebgpu(bytes) {
  const extra = { session: { disable_cpu_ep_fallback: "1" } };
  try {
    return await ort.InferenceSession.create(bytes, { executionProviders: ["webgpu"], extra });
  } catch (error) {
    if (/fallback to CPU EP/.test(error.message)) throw new Error("it has no kernel for some operators of this graph");
    throw error;
  }
}

function checked(session) {
  const [input] = session.inputMetadata;
  if (session.inputNames.length !== 1 || !input.isTensor || input.shape.length !== 4) {
    throw new Error("the graph does not take one picture (N, C, H, W)");
  }
  if (input.type !== "float32") throw new Error(`the graph takes ${input.type}; use one that takes float32`);
  if (input.shape[1] !== 3) {
    throw new Error(
      `the graph takes ${input.shape[1]} channel, not RGB; make it with: srdeploy export ... --color-wrapper`,
    );
  }
  return session;
}
