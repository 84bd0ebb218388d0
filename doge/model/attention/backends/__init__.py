"""Backends of dynamic mask attention, one file a backend. Every module of this package is found and imported."""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
