// What lies in an export folder, and what transformers.js must be told to open it.

import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import path from 'node:path';

/**
 * Name, size in bytes, and the options of `from_pretrained`. A folder with an `onnx/` is laid out as transformers.js
 * looks for it, and its config.json says the rest. A flat folder has the graph beside config.json: "fp32" then means
 * no more than a file name without a suffix.
 */
export function describe(folder) {
  const root = path.resolve(folder);
  if (!existsSync(path.join(root, 'config.json'))) throw new Error(`${folder} is no export: it holds no config.json`);
  const nested = existsSync(path.join(root, 'onnx'));
  const graphs = nested ? path.join(root, 'onnx') : root;
  const weights = readdirSync(graphs).filter((name) => /\.onnx([._]data(_\d+)?)?$/.test(name));
  const flat = { subfolder: '', dtype: 'fp32', use_external_data_format: weights.includes('model.onnx_data') };
  return {
    name: path.basename(root),
    precision: precisionOf(root),
    bytes: weights.reduce((sum, name) => sum + statSync(path.join(graphs, name)).size, 0),
    options: nested ? {} : flat,
  };
}

/** The dtype that export.json names, or nothing where another tool made the folder. */
function precisionOf(root) {
  const file = path.join(root, 'export.json');
  return existsSync(file) ? (JSON.parse(readFileSync(file, 'utf-8')).options?.dtype ?? null) : null;
}
