"""The public ops: validation, lowering to primitives, autograd and fake kernels; one file per op."""
