"""Classes of modules with learned parts: the module's own class, with a forward that announces them.

A module gets such a class in place of its own, as `fully_shard` does it: a forward of the class is inherited by
copies, survives pickling, and hears no hook.  `isinstance`, `super()` and the signature stay what they were.
"""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from nsa_compile import compat
from nsa_compile.learned.parts import LearnedParts

# Name of the attribute of a class that holds the class it was made from.
_BASE = "_nsa_dense_class"


@functools.cache
def attached_class(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the class of modules like those of `base` that carry learned parts, or hold modules that do.

    Under a compiler, its forward binds the module's learned parts to the graph, and runs `base`'s; so does that of a
    model whose layers are compiled one by one.  Without one, it runs the graph that the compiler would have been given,
    rewritten, operator by operator.

    Args:
        base: the module's class.
    """

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            parts = getattr(self, "nsa", None)
            if isinstance(parts, LearnedParts):
                parts.bind(self)
            return base.forward(self, *args, **kwargs)
        if _parts_are_compiled(self):
            return base.forward(self, *args, **kwargs)
        from nsa_compile.learned.eager import run_rewritten

        return run_rewritten(self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class is made, not imported: what is pickled is how to make it.
        made, arguments, *state = super(attached, self).__reduce_ex__(protocol)
        return (_remake, (base, made, arguments[1:]), *state)

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__signature__": inspect.signature(base),
        _BASE: base,
    }
    attached: type[nn.Module] = type(base.__name__, (base,), namespace)
    return attached


def dense_class(module: nn.Module) -> type[nn.Module] | None:
    """Returns the class that a module had before; None where it has its own."""
    return type(module).__dict__.get(_BASE)


def _parts_are_compiled(module: nn.Module) -> bool:
    """Tells whether all learned parts below a module are in modules that are compiled by themselves."""
    if isinstance(module._modules.get("nsa"), LearnedParts):
        return False
    children = [child for child in module.children() if not compat.is_compiled(child)]
    return all(map(_parts_are_compiled, children))


def _remake(base: type[nn.Module], made: Any, arguments: tuple[Any, ...]) -> Any:
    return made(attached_class(base), *arguments)
