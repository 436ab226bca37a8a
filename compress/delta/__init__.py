"""Delta-sparse fine-tunes: what a fine-tune adds to its base model, pruned, packed, verified, applied and switched.

* `masks`, `indices`, `values`: which elements a package holds, and what they are worth;
* `checkpoint`: two folders of safetensors, read tensor by tensor;
* `package`: the file format;
* `pack`, `apply`, `slot`: from two checkpoints to a package, from there to a checkpoint, or into a live model.

The pruning itself is in `compress.methods.darex`.
"""
