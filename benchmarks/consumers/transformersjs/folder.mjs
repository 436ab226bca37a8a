// What lies in an export folder, and what transformers.js must be told to open it.

import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import path from 'node:path';

/**
 * Id, name of the model, precision, size in bytes, and the options of `from_pretrained`. A folder with an `onnx/` is
 * laid out as transformers.js looks for it, and its config.json says the rest. A flat folder has the graph beside
 * config.json: "fp32" then means no more than a file name without a suffix.
 */
export function describe(folder) {
  const root = path.resolve(folder);
  if (!existsSync(path.join(root, 'config.json'))) throw new Error(`${folder} is no export: it holds no config.json`);
  const nested = existsSync(path.join(root, 'onnx'));
  const graphs = nested ? path.join(root, 'onnx') : root;
  const weights = readdirSync(graphs).filter((name) => /\.onnx([._]data(_\d+)?)?$/.test(name));
  const flat = { subfolder: '', dtype: 'fp32', use_external_data_format: weights.includes('model.onnx_data') };
  const id = path.basename(root);
  return {
    id,
    name: id,
    precision: null,
    ...ofOurs(root),
    bytes: weights.reduce((sum, name) => sum + statSync(path.join(graphs, name)).size, 0),
    options: nested ? {} : flat,
  };
}

/** What export.json says of model and precision; nothing where another tool made the folder. */
function ofOurs(root) {
  const file = path.join(root, 'export.json');
  if (!existsSync(file)) return {};
  const { source, options } = JSON.parse(readFileSync(file, 'utf-8'));
  return { name: path.basename(source.name), precision: options.dtype };
}
