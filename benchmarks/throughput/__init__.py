"""Throughput of models that are served: tokens/s with so many requests in flight, taking turns on one machine.

``python -m benchmarks.throughput NAME=PATH NAME=PATH ... -o FILE.json`` measures; the first one is the baseline, and
PATH is a folder that ``foldaway serve`` takes. For each there is one server, and all of them run at once: who is not
asked costs nothing but memory. Where they share a GPU, flags must tell each how much of it is its own::

    python -m benchmarks.throughput dense=smol ragged=smol-25 --flags="--gpu-memory-utilization 0.4" -o vllm.json

* In each round, for each number in flight, every model has its turn, in an order that rotates from round to round.
* A turn is a closed loop: so many requests are open, and whenever one is answered the next is sent. All models get the
  same prompts in a round, greedily, with as many tokens to answer (no end is accepted before), streamed. Each prompt
  begins with a number that its server has not seen, so that no cache of prefixes knows it.
* Tokens/s are all tokens of all answers over the time of the turn. TTFT ends at the first chunk with a choice, E2E at
  the last one, and TPOT is what lies between them over the tokens but the first, as in vLLM's own benchmark.
* A turn for each model and number in flight, before the others, does not count. An answer that fails or is too short
  ends the command: what is compared is to be alike.
* Ratios to the baseline come with intervals from rounds in pairs, and beside them stands what parameters alone would
  give, the baseline's over the model's: decoding reads every weight once for each step. Not so where blocks share,
  whose weights are read once for each block that is executed: there nothing stands.

The log of each server lies beside FILE.json.
"""
