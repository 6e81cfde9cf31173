"""What torch.compile shall not look into.

torch.compiler has decorators for that, which import the compiler: two seconds, more than a third of the time that every
script takes to start, and most runs never compile anything. These do without.
"""

import functools

import torch


def untraced(function):
    """Decorator: what torch.compile traces ends before a call of this function, and goes on after it."""

    @functools.wraps(function)
    def called(*arguments, **options):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return called


def constant(function):
    """Decorator: torch.compile calls this function while it traces, and takes what it returns for a constant."""
    function._dynamo_marked_constant = True  # all that torch.compiler.assume_constant_result does but its import
    return function
