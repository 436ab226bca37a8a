// Serves the page, transformers.js, onnxruntime's WebAssembly and one export on 127.0.0.1, and nothing else.
// node server.mjs DIR [PORT] shows an export to a person.

import { createReadStream, existsSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import path from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { describe } from './folder.mjs';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const MODULES = path.join(HERE, 'node_modules');

const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.mjs': 'text/javascript',
  '.js': 'text/javascript',
  '.json': 'application/json',
  '.wasm': 'application/wasm',
};

// Threads of WebAssembly share memory, which browsers allow to isolated pages only.
const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cache-Control': 'no-store',
};

/** Start serving `folder`; resolves to the server and its address. Port 0 takes a free one. */
export async function serve(folder, port = 0) {
  const about = describe(folder);
  const roots = {
    '/model/': path.resolve(folder),
    '/onnxruntime/': path.join(MODULES, 'onnxruntime-web', 'dist'),
    '/transformers/': path.join(MODULES, '@huggingface', 'transformers', 'dist'),
    '/': HERE,
  };
  const server = createServer((request, response) => {
    const url = decodeURIComponent(new URL(request.url, 'http://127.0.0.1').pathname);
    if (url === '/about.json') send(response, 200, 'application/json', JSON.stringify(about));
    else sendFile(request, response, fileOf(roots, url === '/' ? '/page.html' : url));
  });
  await new Promise((resolve, reject) => server.once('error', reject).listen(port, '127.0.0.1', resolve));
  return { server, address: `http://127.0.0.1:${server.address().port}/` };
}

/** The file that a path stands for, or null: none outside the folders that are served. */
function fileOf(roots, url) {
  const [prefix, root] = Object.entries(roots).find(([prefix]) => url.startsWith(prefix));
  const file = path.join(root, url.slice(prefix.length));
  const inside = file.startsWith(root + path.sep);
  return inside && existsSync(file) && statSync(file).isFile() ? file : null;
}

function sendFile(request, response, file) {
  if (file === null) return send(response, 404, 'text/plain', 'not found');
  const type = TYPES[path.extname(file)] ?? 'application/octet-stream';
  response.writeHead(200, { ...HEADERS, 'Content-Type': type, 'Content-Length': statSync(file).size });
  if (request.method === 'HEAD') return response.end();
  return createReadStream(file).pipe(response);
}

function send(response, status, type, text) {
  response.writeHead(status, { ...HEADERS, 'Content-Type': type }).end(text);
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const [folder, port = '8080'] = process.argv.slice(2);
  const { address } = await serve(folder, Number(port));
  console.log(`Open ${address}`);
}
