"""Which leaves of a tree are quantized. No JAX here."""


def names_a_weight(path: str) -> bool:
    """Whether a leaf of this path is quantized where nobody says otherwise, and its dtype and axes allow."""
    return path.rpartition("/")[2] not in ("bias", "scale")
