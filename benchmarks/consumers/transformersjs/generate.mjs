// node generate.mjs '{"folder": DIR, "prompt": TEXT, "new_tokens": N, "threads": N}'
// Continues the prompt with onnxruntime-node; the last line of stdout is one JSON object.

import path from 'node:path';
import * as library from '@huggingface/transformers';
import { describe } from './folder.mjs';
import { firstLine, greedy, open } from './greedy.mjs';

async function main({ folder, prompt, new_tokens, threads }) {
  const { id, options } = describe(folder);
  library.env.allowRemoteModels = false;
  library.env.localModelPath = path.dirname(path.resolve(folder));
  const opened = await open(library, id, { ...options, session_options: { intraOpNumThreads: threads } });
  const done = await greedy(opened, prompt, new_tokens);
  return { ...done, load_seconds: opened.load_seconds };
}

try {
  console.log(JSON.stringify(await main(JSON.parse(process.argv[2]))));
} catch (error) {
  console.error(firstLine(error));
  process.exitCode = 1;
}
