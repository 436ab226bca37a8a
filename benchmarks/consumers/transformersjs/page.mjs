// The page's own part: what is seen. The model runs in worker.mjs.
// ?prompt=TEXT&tokens=N generates at once; &threads=N sets the threads. `finished` then resolves to what came of it.

const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
const worker = new Worker('worker.mjs', { type: 'module' });

/** Ask the worker; text and progress on the way are shown, the answer is returned. */
function ask(message) {
  return new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message ?? 'the worker did not start'));
    worker.onmessage = ({ data }) => {
      if (data.kind === 'text') $('text').textContent += data.text;
      if (data.kind === 'progress') $('progress').value = data.bytes;
      if (data.kind === 'done') resolve(data.result);
      if (data.kind === 'failed') reject(new Error(data.message));
    };
    worker.postMessage(message);
  });
}

async function open() {
  const about = await (await fetch('about.json')).json();
  const threads = Number(asked.get('threads')) || Math.min(4, navigator.hardwareConcurrency);
  $('progress').max = about.bytes;
  const megabytes = `${(about.bytes / 1e6).toFixed(0)} MB`;
  $('name').textContent = about.name;
  const facts = [about.precision, megabytes, 'runs in this browser, nothing leaves it'];
  $('facts').textContent = facts.filter(Boolean).join(' · ');
  const { load_seconds } = await ask({ kind: 'open', options: about.options, threads });
  $('progress').hidden = true;
  $('go').disabled = false;
  $('numbers').textContent = `Loaded in ${load_seconds.toFixed(1)} s · ${threads} thread${threads === 1 ? '' : 's'}`;
  return { load_seconds };
}

async function generate() {
  const [prompt, new_tokens] = [$('prompt').value, Number($('tokens').value)];
  $('asked').textContent = prompt;
  $('text').textContent = '';
  $('go').disabled = true;
  $('output').classList.add('busy');
  try {
    const result = await ask({ kind: 'generate', prompt, new_tokens });
    const speed = result.decode_tokens_per_second;
    $('numbers').textContent = `${result.tokens.length} tokens` + (speed ? ` · ${speed.toFixed(1)} tokens/s` : '');
    return result;
  } finally {
    $('output').classList.remove('busy');
    $('go').disabled = false;
  }
}

function fail(error) {
  $('progress').hidden = true;
  $('output').classList.add('failed');
  $('text').textContent = error.message;
  $('numbers').textContent = '';
  return { error: error.message };
}

async function start() {
  const opened = await open();
  $('form').onsubmit = (event) => {
    event.preventDefault();
    generate().catch(fail);
  };
  return asked.has('prompt') ? { ...opened, ...(await generate()) } : opened;
}

if (asked.has('prompt')) $('prompt').value = asked.get('prompt');
if (asked.has('tokens')) $('tokens').value = asked.get('tokens');
globalThis.finished = start().catch(fail);
