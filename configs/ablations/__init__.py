"""Ablations as data: a file beside this one is one axis, and says which fields it varies and how.

Each has `get_variants(base)`: a stage-1 config -> {name of a variant: {field: value}}, the fields to change in it. A
variant that changes nothing is the base itself. `experiments/ablate.py` trains and scores them.
"""

import importlib
import pkgutil

AXES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def get_variants(axis, base):
    """{name: {field: value}} of the axis, of which each leaves out the fields that already have their value in base."""
    variants = importlib.import_module(f"{__name__}.{axis}").get_variants(base)
    return {name: {field: value for field, value in fields.items() if _lookup(base, field) != value}
            for name, fields in variants.items()}


def _lookup(config, field):
    section, name = field.split(".")
    return config[section][name]
