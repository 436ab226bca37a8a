"""A model behind HTTP: an ONNX export or a Hugging Face model, served with OpenAI's routes; or by vLLM.

What opens and serves is in `service`; nothing is imported here, for vLLM loads our plugin in each of its processes.
"""
