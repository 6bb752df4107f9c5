"""One rule for text and video: which splits of a dataset are for training and which for validation."""

from collections.abc import Mapping

# Usual names, the preferred one first. "test" is none of them: the validation loss selects the best weights, so that a
# test split used for it would no longer test anything.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def name_splits(splits: Mapping, source: str) -> dict:
    """Call the validation split "validation", whichever of its usual names it has.

    Args:
        splits: datasets by their names.
        source: of the datasets, for the message.

    Returns:
        The same datasets: "train", perhaps "validation", and the others under their own names.

    Raises:
        ValueError: if there is no "train".
    """
    if "train" not in splits:
        raise ValueError(f"{source} has the splits {', '.join(sorted(splits))}, expected one named train")
    found = next((name for name in VALIDATION_NAMES if name in splits), None)
    return {"validation" if name == found else name: split for name, split in splits.items()}
