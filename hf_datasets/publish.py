"""Publish a dataset: Parquet files that `datasets.load_dataset` opens for everyone, their card, and the upload.

    python -m hf_datasets.publish icbhi --data_dir ICBHI --repo_id USER/icbhi-2017 --private
    python -m hf_datasets.publish simulated --dry_run

The rows are the builder's own, one at a time: nothing is decoded, and memory holds one recording and one row group.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from . import BUILDERS
from .builder import CONFIGS, LungSoundBuilder
from .card import FIGURE, SOURCES, build_dataset_card, draw_cycles, incomplete
from .hub import HubError, Repository

# Of the Arrow tables. Readers hold a row group in memory, and the Hub's viewer refuses those above 300 MB.
ROW_GROUP_BYTES = 32_000_000
SHARD_BYTES = 300_000_000


def write_dataset(
    name: str, data_dir: str | None, folder: Path, allow_missing_audio: bool = False, repo_id: str | None = None
) -> dict[str, Path]:
    """Write a dataset as it is published; what else is in the folder stays, but for its earlier Parquet files.

    Args:
        name: `icbhi`, `sprsound` or `simulated`.
        data_dir: as in `hf_datasets.load`.
        folder: to write to.
        allow_missing_audio: publish what is there; the card tells what is missing.
        repo_id: Hub id, for the example in the card.

    Returns:
        The files: path within the folder -> where it is.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as `hf_datasets.load`; a whole split that is missing is an error
            too.
    """
    builders = [open_builder(name, config, data_dir, allow_missing_audio) for config in CONFIGS]
    source, recordings = SOURCES[name], builders[-1].recordings
    if (missing := incomplete(source, recordings)) and not allow_missing_audio:
        raise FileNotFoundError(
            f"{missing}. Put them in place, or pass allow_missing_audio=True to publish the others."
        )
    infos, files = {}, {}
    for config, builder in zip(CONFIGS, builders, strict=True):
        infos[config], paths = write_config(builder, folder / config)
        files.update({f"{config}/{path.name}": path for path in paths})
    draw_cycles(recordings, folder / FIGURE, source.title)
    (folder / "README.md").write_text(build_dataset_card(source, recordings, infos, repo_id), encoding="utf-8")
    return {**files, **{file: folder / file for file in (FIGURE, "README.md")}}


def open_builder(name: str, config: str, data_dir: str | None, allow_missing_audio: bool) -> LungSoundBuilder:
    """Read and check a dataset's files, without building it in the cache."""
    data_dir = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
    return BUILDERS[name](config, data_dir, allow_missing_audio=allow_missing_audio)


def write_config(builder: LungSoundBuilder, folder: Path) -> tuple[datasets.DatasetInfo, list[Path]]:
    """Write every split of a config; gives what the card tells of it, and the files."""
    splits, files = datasets.SplitDict(), []
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.parquet"):
        earlier.unlink()
    for split in builder.recordings:
        tables = (table for _, table in builder._generate_tables(split))  # what `load` would put into the cache
        paths, rows, size = write_shards(tables, builder.info.features.arrow_schema, folder, split)
        splits.add(datasets.SplitInfo(split, num_bytes=size, num_examples=rows))
        files += paths
        print(f"{folder.name}/{split}: {rows:,} rows in {len(paths)} file{'s' * (len(paths) > 1)}", flush=True)
    # A new one: the builder's own names folders of this machine.
    info = datasets.DatasetInfo(
        features=builder.info.features,
        splits=splits,
        download_size=sum(path.stat().st_size for path in files),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )
    return info, files


def write_shards(
    tables: Iterable[pa.Table], schema: pa.Schema, folder: Path, split: str
) -> tuple[list[Path], int, int]:
    """Write tables into files of `SHARD_BYTES` or little more; gives these, and the rows and bytes of the tables."""
    paths: list[Path] = []
    rows = size = 0
    writer, room = None, 0
    for group in _row_groups(tables):
        if writer is None:
            paths.append(folder / f"{split}-{len(paths):05d}.parquet")
            # Chunks that end where the content says: the Hub then stores what two versions share once.
            writer = pq.ParquetWriter(paths[-1], schema, compression="zstd", use_content_defined_chunking=True)
            room = SHARD_BYTES
        writer.write_table(group, row_group_size=len(group))
        rows, size, room = rows + len(group), size + group.nbytes, room - group.nbytes
        if room <= 0:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
    named = [path.with_name(f"{path.stem}-of-{len(paths):05d}.parquet") for path in paths]
    return [path.rename(name) for path, name in zip(paths, named, strict=True)], rows, size


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put tables together until they hold `ROW_GROUP_BYTES`."""
    held: list[pa.Table] = []
    size = 0
    for table in tables:
        held.append(table)
        size += table.nbytes
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held)
            held, size = [], 0
    if held:
        yield pa.concat_tables(held)


def main() -> None:
    """Write a dataset, and upload it unless told not to."""
    parser = argparse.ArgumentParser("python -m hf_datasets.publish", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("dataset", choices=sorted(BUILDERS))
    parser.add_argument("--data_dir", help="folder of the dataset, as in hf_datasets.load; downloaded if not given")
    parser.add_argument("--repo_id", help="USER/NAME on the Hub; made where it is not there yet")
    parser.add_argument("--output_dir", type=Path, help="where it is written; default: published/DATASET")
    parser.add_argument("--dry_run", action="store_true", help="write the folder, upload nothing")
    parser.add_argument("--private", action="store_true", help="make a repository that others may not see")
    parser.add_argument("--allow_missing_audio", action="store_true", help="publish what is there; the card tells")
    args = parser.parse_args()
    if not (args.repo_id or args.dry_run):
        parser.error("give --repo_id USER/NAME to upload to, or --dry_run to write the folder alone")
    folder = args.output_dir or Path("published", args.dataset)
    try:
        repository = None
        if not args.dry_run:
            open_builder(args.dataset, "recordings", args.data_dir, args.allow_missing_audio)  # before anything is made
            repository = Repository(args.repo_id, "dataset", private=args.private or None).create()
        repo_id = repository.repo_id if repository else args.repo_id
        files = write_dataset(args.dataset, args.data_dir, folder, args.allow_missing_audio, repo_id)
        print(f"Written to {folder}. {SOURCES[args.dataset].terms}")
        if repository:
            folders = tuple(f"{config}/" for config in CONFIGS)
            print(f"Uploaded: {repository.push(files, f'Publish {SOURCES[args.dataset].title}', folders)}")
    except (HubError, OSError, ValueError) as error:
        told = str(error).replace("allow_missing_audio=True", "--allow_missing_audio")
        raise SystemExit(f"publish: error: {told}") from error


if __name__ == "__main__":
    main()
