"""Arithmetic of launches.  Triton has the same functions, made for kernels; they took a quarter of a launch's time."""


def cdiv(number: int, divisor: int) -> int:
    """Returns the quotient rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Returns the smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()
