"""Exports beside the runtimes that people use otherwise: size, memory and speed of each, taking turns on one machine.

``python -m benchmarks.runtimes NAME=KIND:PATH ...`` measures; KIND is one of

* ``onnx``: an export folder of ours, in the session that our server uses;
* ``genai``: a folder of onnxruntime-genai, ours or one that its model builder made;
* ``optimum``: a folder that ``optimum-cli export onnx`` made, in an environment with optimum-onnx;
* ``torch``: a Hugging Face folder, by transformers in the dtype of its file;
* ``llama.cpp``: a GGUF file, by llama-cpp-python.

Every run is a process of its own, and in each round every side has one. A side whose packages collide with ours, or
that we do not want to depend on, runs in another interpreter: ``--python NAME=PATH``. ``make test-consumers`` builds
one with optimum-onnx (``.consumers/optimum/bin/python``); llama.cpp is compiled for this CPU while it installs::

    python3 -m venv .consumers/llama.cpp
    .consumers/llama.cpp/bin/pip install llama-cpp-python

* Memory is what the process holds beyond what it held after its imports: after loading, after a prompt of 64 tokens and
  16 tokens more, and at its peak.
* Prefill is a prompt of 400 tokens, decoding 64 tokens after one of 16; greedy, one stream. A run takes the median of a
  few, after one that does not count; a side is the median of its runs.
* The ceiling: decoding one token reads every weight once. The bytes of the weights, over how fast this machine reads
  memory with as many threads (measured in the same command), is the shortest time that a token can take.

A context that is too short for that makes prompts and continuations shorter, for all sides.
"""
