// node chromium.mjs '{"folder": DIR, "prompt": TEXT, "new_tokens": N, "threads": N, "chromium": FILE,
//                     "screenshot": FILE or null}'
// Lets a headless Chromium open the page and generate; the last line of stdout is one JSON object.
// Chromium is driven through the DevTools protocol on two pipes, which needs no library and no port.

import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { firstLine } from './greedy.mjs';
import { serve } from './server.mjs';

/** The DevTools protocol over pipes 3 and 4: JSON messages, each ended by a zero byte. */
class DevTools {
  #browser;
  #asked = new Map();
  #rest = '';
  onEvent = () => {};

  constructor(browser) {
    this.#browser = browser;
    browser.stdio[4].setEncoding('utf-8').on('data', (chunk) => this.#read(chunk));
    browser.on('error', (error) => this.#fail(`Chromium did not start: ${firstLine(error)}`));
    browser.on('exit', (code) => this.#fail(`Chromium ended with code ${code}`));
  }

  send(method, params = {}, sessionId = undefined) {
    const id = ++DevTools.last;
    this.#browser.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId })}\0`);
    return new Promise((resolve, reject) => this.#asked.set(id, { resolve, reject }));
  }

  #read(chunk) {
    const messages = (this.#rest + chunk).split('\0');
    this.#rest = messages.pop();
    for (const { id, result, error, ...event } of messages.map((text) => JSON.parse(text))) {
      if (id === undefined) this.onEvent(event);
      else if (error) this.#asked.get(id).reject(new Error(error.message));
      else this.#asked.get(id).resolve(result);
      this.#asked.delete(id);
    }
  }

  #fail(message) {
    for (const { reject } of this.#asked.values()) reject(new Error(message));
  }
}
DevTools.last = 0;

function launch(chromium, profile) {
  const flags = [
    '--headless=new',
    '--remote-debugging-pipe',
    `--user-data-dir=${profile}`,
    '--window-size=960,680',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-dev-shm-usage',
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1', // whatever wants to go out fails
    ...(process.getuid() === 0 ? ['--no-sandbox'] : []), // Chromium has no sandbox for root
  ];
  return spawn(chromium, flags, { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'] });
}

/** Open a tab whose requests, and those of its workers, are collected in `requests`. */
async function openTab(tools, requests) {
  const watch = async (sessionId) => {
    await Promise.all([
      tools.send('Network.enable', { maxTotalBufferSize: 0, maxResourceBufferSize: 0 }, sessionId),
      tools.send('Target.setAutoAttach', { autoAttach: true, waitForDebuggerOnStart: true, flatten: true }, sessionId),
      tools.send('Runtime.runIfWaitingForDebugger', {}, sessionId),
    ]).catch(() => {}); // a worker may end before it is watched
  };
  tools.onEvent = ({ method, params }) => {
    if (method === 'Network.requestWillBeSent') requests.push(params.request.url);
    if (method === 'Target.attachedToTarget') watch(params.sessionId);
  };
  const { targetId } = await tools.send('Target.createTarget', { url: 'about:blank' });
  const { sessionId } = await tools.send('Target.attachToTarget', { targetId, flatten: true });
  await watch(sessionId);
  return sessionId;
}

/** What the page's promise `finished` resolves to. */
async function finish(tools, tab, url) {
  const loaded = new Promise((resolve) => {
    const before = tools.onEvent;
    tools.onEvent = (event) => {
      before(event);
      if (event.method === 'Page.loadEventFired') resolve();
    };
  });
  await tools.send('Page.enable', {}, tab);
  await tools.send('Page.navigate', { url }, tab);
  await loaded;
  return evaluate(tools, tab, 'finished');
}

/** The value of an expression on the page; a promise is waited for. */
async function evaluate(tools, tab, expression) {
  const asked = { expression, awaitPromise: true, returnByValue: true };
  const { result, exceptionDetails } = await tools.send('Runtime.evaluate', asked, tab);
  if (exceptionDetails) throw new Error(`the page failed: ${exceptionDetails.exception?.description}`);
  return result.value;
}

async function photograph(tools, tab, file) {
  const { data } = await tools.send('Page.captureScreenshot', { format: 'png' }, tab);
  writeFileSync(file, Buffer.from(data, 'base64'));
}

async function main({ folder, prompt, new_tokens, threads, chromium, screenshot }) {
  const { server, address } = await serve(folder);
  const profile = mkdtempSync(path.join(tmpdir(), 'foldaway-chromium-'));
  const browser = launch(chromium, profile);
  const ended = new Promise((resolve) => browser.once('close', resolve));
  try {
    const tools = new DevTools(browser);
    const requests = [];
    const tab = await openTab(tools, requests);
    const asked = new URLSearchParams({ prompt, tokens: new_tokens, threads });
    const result = await finish(tools, tab, `${address}?${asked}`);
    if (result.error) throw new Error(result.error);
    if (screenshot) await photograph(tools, tab, screenshot);
    return { ...result, shown: await evaluate(tools, tab, "document.getElementById('text').textContent"), requests };
  } finally {
    browser.kill();
    await ended;
    server.close();
    server.closeAllConnections();
    rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

try {
  console.log(JSON.stringify(await main(JSON.parse(process.argv[2]))));
} catch (error) {
  console.error(firstLine(error));
  process.exitCode = 1;
}
