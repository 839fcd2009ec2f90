"""The cache key: compiled code is found again only by the same sources of this package and the same configuration.

Inductor and AOTAutograd key their caches by the graph.  An operator is a name in that graph: its Python code, its
gradient and its lowering are not seen, and code that was compiled before a change of them would be served after it.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from nsa_compile import compat
from nsa_compile.config import NSAConfig

_SOURCE_SUFFIXES = (".py", ".jinja")


@functools.cache
def source_hash() -> str:
    """Returns a hash of every source file of the package, its passes and kernels with it; "" where none is on disk."""
    return hash_sources(Path(__file__).parent)


def hash_sources(folder: Path) -> str:
    """Returns a hash over the names and contents of the source files under a folder, through links.

    Returns:
        64 hexadecimal digits; "" if there is no source file.
    """
    sources = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(_SOURCE_SUFFIXES)
    )
    if not sources:
        return ""
    digest = hashlib.sha256()
    for source in sources:
        content = source.read_bytes()
        digest.update(f"{source.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


class CacheKey(compat.graph_pass_class()):
    """A pass over the joint graph that changes nothing itself: its `uuid` enters the caches' keys.

    It takes the place of the user's own `joint_custom_pre_pass` and runs that.

    Args:
        config: the configuration of the rewrite.
        passes: the user's passes over the joint graph, in order.
    """

    def __init__(self, config: NSAConfig, passes: tuple[Callable[[fx.Graph], None], ...] = ()) -> None:
        self.config = config
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        """Runs the user's passes."""
        for user_pass in self.passes:
            user_pass(graph)

    def uuid(self) -> Any:
        """Returns what must be equal for compiled code to be reused; None, which turns caching off, if unknown."""
        theirs = tuple(getattr(user_pass, "uuid", lambda: None)() for user_pass in self.passes)
        if not source_hash() or None in theirs:
            return None
        return ("nsa_compile", source_hash(), tuple(self.config.to_dict().items()), theirs)


def with_cache_key(patches: Mapping[str, Any], config: NSAConfig) -> dict[str, Any]:
    """Returns patches of Inductor's configuration with the cache key put in, around the user's own joint pass."""
    return {**patches, "joint_custom_pre_pass": CacheKey(config, compat.joint_passes(patches))}
