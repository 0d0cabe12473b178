"""What lets models of other libraries run on pyext: `pyext.integrations.transformers`, `pyext.integrations.diffusers`.

Each is imported when it is first asked for, as it imports its library.
"""

import importlib

_MODULES = ("diffusers", "transformers")


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
