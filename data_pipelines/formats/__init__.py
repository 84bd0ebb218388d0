"""Formats: how a row becomes a document, one file a format. Every module of this package is found and imported."""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
