"""Every error that this package raises for a user's mistake: one class per diagnostic.

All derive from `NSAError`, itself a `ValueError`.  A message says what was given, what is accepted,
and what to do about it.
"""


class NSAError(ValueError):
    """Base of all errors that nsa_compile raises on purpose."""


class ConfigError(NSAError):
    """A field of `NSAConfig`, or a combination of fields, is not one that NSA is defined for."""


class UnknownOptionError(ConfigError):
    """An `nsa.*` option, given to `torch.compile` or on the command line, names no field of `NSAConfig`."""


class ShapeError(NSAError):
    """A tensor's rank or size does not fit the others."""


class HeadCountError(ShapeError):
    """The number of KV heads does not divide the number of query heads."""


class DtypeError(NSAError):
    """A tensor's dtype is not supported, or the tensors' dtypes differ."""


class DeviceError(NSAError):
    """The tensors live on different devices."""


class LayoutError(NSAError):
    """A tensor's memory layout is not supported: the last dimension must be contiguous."""


class GatesError(NSAError):
    """`combine="gated"` was asked for without gates, or gates were given where none are used."""


class CompressionError(NSAError):
    """Compressed keys and values do not fit the configuration, or the compression needs learned parts."""


class SecondDerivativeError(NSAError):
    """A second derivative was asked for; the operators have first derivatives only."""


class AttachError(NSAError):
    """Learned parts cannot be attached to a model, or taken from it, in the way that was asked for."""


class NotRewrittenError(NSAError):
    """A module with learned parts would have run dense: its attention was not, or cannot be, rewritten."""


class RequirementError(NSAError, RuntimeError):
    """A rewritten graph got inputs for which the rewrite is not right, such as soft weights where padding is 0 or 1."""


class UnsupportedGraphError(NSAError):
    """What was given to `rewrite` is not a graph that the passes can read."""


class ModelLoadError(NSAError):
    """A model named on the command line cannot be loaded."""


class InternalError(NSAError):
    """A pass failed on a graph that it should have rewritten or declined: a bug of nsa_compile, not of the model."""
