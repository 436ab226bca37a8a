// The model, away from the page's own thread so that the page stays alive while it computes.

import * as library from '/transformers/transformers.min.js';
import { firstLine, greedy, open } from './greedy.mjs';

const { env } = library;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = '/';
env.useBrowserCache = false;
env.useWasmCache = false;
const wasm = '/onnxruntime/ort-wasm-simd-threaded.asyncify';
env.backends.onnx.wasm.wasmPaths = { mjs: `${wasm}.mjs`, wasm: `${wasm}.wasm` };

let opened;

const answers = {
  async open({ options, threads }) {
    env.backends.onnx.wasm.numThreads = threads;
    const loaded = {}; // bytes of each file
    const progress_callback = (event) => {
      if (event.status !== 'progress') return;
      loaded[event.file] = event.loaded;
      postMessage({ kind: 'progress', bytes: Object.values(loaded).reduce((sum, bytes) => sum + bytes, 0) });
    };
    opened = await open(library, 'model', { ...options, progress_callback });
    return { load_seconds: opened.load_seconds };
  },
  generate: ({ prompt, new_tokens }) =>
    greedy(opened, prompt, new_tokens, (text) => postMessage({ kind: 'text', text })),
};

self.onmessage = async ({ data }) => {
  try {
    postMessage({ kind: 'done', result: await answers[data.kind](data) });
  } catch (error) {
    postMessage({ kind: 'failed', message: firstLine(error) });
  }
};
