"""`nsa::require_binary`: stops a rewritten graph where what was supposed of its inputs does not hold.

Its result has to be read by whatever is wrong without it.  So no compiler can drop it or move it behind its readers,
as it can an assertion that gives nothing; and no compiler looks into it: Inductor would put torch's own assertion into
a loop that runs on several threads of a CPU, where an error ends the process.
"""

import torch
from torch import Tensor

from nsa_compile.errors import RequirementError


def require_binary(values: Tensor, message: str) -> Tensor:
    """Raises an error unless a tensor holds 0 and 1 alone.

    Args:
        values: any shape and dtype; NaN is neither 0 nor 1.
        message: what the error says.

    Returns:
        True, as a bool of rank 0.

    Raises:
        RequirementError: there are other values.  CUDA has a device-side assertion instead: an error in Python would
            have to wait for the device, which a CUDA graph cannot record.
    """
    is_binary = values.eq(0).logical_or_(values.eq(1)).all()
    if is_binary.device.type == "cuda":
        torch._assert_async(is_binary, message)
    elif not is_binary:
        raise RequirementError(message)
    return is_binary


def _fake_require_binary(values: Tensor, message: str) -> Tensor:  # noqa: ARG001
    return values.new_empty((), dtype=torch.bool)


def _register() -> torch.library.Library:
    library = torch.library.Library("nsa", "FRAGMENT")
    library.define("require_binary(Tensor values, str message) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    library.impl("require_binary", require_binary, "CompositeExplicitAutograd")
    torch.library.register_fake("nsa::require_binary", _fake_require_binary, lib=library)
    return library


# A second import of this file, under another name or after a reload, finds the operator in place.
if not hasattr(torch.ops.nsa, "require_binary"):
    LIBRARY = _register()
