"""The class names of the datasets, and how one naming maps to another.

`LABELS` are the four classes of the ICBHI 2017 challenge in the order that every checkpoint uses, `EVENT_TYPES` and
`RECORD_LABELS` the names of the BioCAS 2022 challenge (SPRSound) in its own spelling.
"""

LABELS = ("normal", "crackle", "wheeze", "both")

EVENT_TYPES = ("Normal", "Rhonchi", "Wheeze", "Stridor", "Coarse Crackle", "Fine Crackle", "Wheeze+Crackle")

RECORD_LABELS = ("Normal", "CAS", "DAS", "CAS & DAS", "Poor Quality")

# event type -> (crackle, wheeze). Rhonchi and Stridor are continuous sounds of the large airways, neither crackle nor
# (by default) wheeze, so they have no place among the four classes.
_EVENT_FLAGS = {
    "Normal": (False, False),
    "Wheeze": (False, True),
    "Coarse Crackle": (True, False),
    "Fine Crackle": (True, False),
    "Wheeze+Crackle": (True, True),
}
_CONTINUOUS = ("Rhonchi", "Stridor")


def label_of(crackle: bool | None, wheeze: bool | None) -> str | None:
    """Name of the class that two flags make, one of `LABELS`; None where either flag is unknown."""
    if crackle is None or wheeze is None:
        return None
    return LABELS[int(crackle) + 2 * int(wheeze)]


def event_flags(event_type: str, continuous_as_wheeze: bool = False) -> tuple[bool | None, bool | None]:
    """(crackle, wheeze) of an SPRSound event; (None, None) for Rhonchi and Stridor.

    Args:
        event_type: one of `EVENT_TYPES`.
        continuous_as_wheeze: count Rhonchi and Stridor as wheezes instead.

    Raises:
        ValueError: the event type is not one of `EVENT_TYPES`.
    """
    if event_type not in EVENT_TYPES:
        raise ValueError(f"unknown event type {event_type!r}: it must be one of {', '.join(EVENT_TYPES)}")
    if event_type in _CONTINUOUS:
        return (False, True) if continuous_as_wheeze else (None, None)
    return _EVENT_FLAGS[event_type]
