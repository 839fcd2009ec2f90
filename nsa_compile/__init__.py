"""Native Sparse Attention for torch.compile."""

from nsa_compile import errors
from nsa_compile.config import NSAConfig
from nsa_compile.errors import NSAError
from nsa_compile.operator import nsa_attention

__all__ = ["NSAConfig", "NSAError", "errors", "nsa_attention"]
