// Open an export and continue a prompt greedily: the same lines on Node and in a browser.

/**
 * Tokenizer and model of the export called `id` below `env.localModelPath`.
 *
 * @param library the module @huggingface/transformers
 * @param options of `from_pretrained`, for the model alone
 */
export async function open(library, id, options) {
  const started = performance.now();
  const tokenizer = await openTokenizer(library, id);
  const model = await library.AutoModelForCausalLM.from_pretrained(id, options);
  return { library, tokenizer, model, load_seconds: (performance.now() - started) / 1000 };
}

async function openTokenizer(library, id) {
  try {
    return await library.AutoTokenizer.from_pretrained(id);
  } catch (error) {
    throw new Error(
      `transformers.js cannot read the tokenizer of this export (${firstLine(error)}); it needs tokenizer.json and ` +
        `tokenizer_config.json of a kind that it knows`,
    );
  }
}

/** The first line of what an error says. */
export function firstLine(error) {
  return String(error?.message ?? error).split('\n')[0].trim();
}

/**
 * The greedy continuation of `prompt` as it is, without a chat template; it ends after `count` tokens or at the end of
 * text. `onText` is given each piece of text as it comes.
 */
export async function greedy({ library, tokenizer, model }, prompt, count, onText = () => {}) {
  const tokens = [];
  const seconds = [];
  const streamer = new library.TextStreamer(tokenizer, {
    skip_prompt: true,
    decode_kwargs: { skip_special_tokens: true },
    callback_function: onText,
    token_callback_function: (ids) => {
      tokens.push(...ids.map(Number));
      seconds.push(performance.now() / 1000);
    },
  });
  const asked = { max_new_tokens: count, do_sample: false, repetition_penalty: 1, streamer };
  await model.generate({ ...tokenizer(prompt), ...asked });
  return {
    text: tokenizer.decode(tokens, { skip_special_tokens: true }),
    tokens,
    decode_tokens_per_second: (seconds.length - 1) / (seconds.at(-1) - seconds[0]) || null,
  };
}
