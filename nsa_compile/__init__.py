"""Native Sparse Attention for torch.compile: `torch.compile(model, backend=nsa_backend)`."""

from nsa_compile import errors
from nsa_compile.attach import attach, detach, learned_parts
from nsa_compile.backend import NSABackend, collect_reports, nsa_backend
from nsa_compile.config import NSAConfig
from nsa_compile.errors import NSAError
from nsa_compile.explain import explain
from nsa_compile.learned.storage import load_learned, save_learned
from nsa_compile.operator import nsa_attention
from nsa_compile.report import RewriteReport, SiteReport
from nsa_compile.rewriting import rewrite

__all__ = [
    "NSAConfig",
    "NSABackend",
    "nsa_backend",
    "nsa_attention",
    "rewrite",
    "explain",
    "attach",
    "detach",
    "learned_parts",
    "save_learned",
    "load_learned",
    "collect_reports",
    "RewriteReport",
    "SiteReport",
    "NSAError",
    "errors",
]
