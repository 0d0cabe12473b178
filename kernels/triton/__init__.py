"""Triton kernels of ``pyext``, one module per op, installed as ``pyext.kernels``.

The folder is ``kernels/triton`` in the repository and ``pyext.kernels`` once installed (``package-dir`` in
pyproject.toml): a top-level package named ``kernels`` would shadow somebody else's.
"""
