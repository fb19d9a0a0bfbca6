"""Which files does a dataset's name mean? `hf:NAME`, as the package `datasets` finds or downloads it."""

from __future__ import annotations

from pathlib import Path

from concertina.errors import DataError

__all__ = ["PREFIX", "dataset_files"]

PREFIX = "hf:"


def dataset_files(source: str) -> list[Path]:
    """Arrow files of `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, in order; the split is `train` if none is
    named. Whatever `datasets` reads by that name: its cache first, then the network.

    Raises DataError without the package, or for what it cannot find.
    """
    name, *more = source.removeprefix(PREFIX).split(":")
    if not name or len(more) > 2:
        raise DataError(f"data.source: {source!r} is no dataset: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source} needs the package datasets: pip install 'concertina[data]', or save the dataset with "
            "save_to_disk where it is installed, and name that folder"
        ) from None
    split, config = (more or ["train"])[-1], more[0] if len(more) == 2 else None
    try:
        found = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{source}: datasets finds no such data: {said}; correct the name, or name a folder") from error
    return [Path(entry["filename"]) for entry in found.cache_files]
