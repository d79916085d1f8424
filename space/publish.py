"""Publish the page as a Hugging Face Space: `python space/publish.py --repo_id USER/NAME`; `--dry_run` writes it."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_datasets.hub import HubError, Repository

SPACE = Path(__file__).resolve().parent
PACKAGE = SPACE.parent / "modeling_qlung"
WRITTEN = Path("published", "space")
# Named one by one, so that whatever else lies there stays there. Of the package goes what a page needs: what a
# checkpoint carries, and inference.
PATTERNS = {
    SPACE: (
        *("README.md", "requirements.txt", "packages.txt", "style.css", "sounds/*.flac"),
        *("app.py", "examples.py", "figures.py", "recordings.py", "wording.py"),
        *("model/*.py", "model/*.json", "model/*.safetensors", "model/*.png", "model/README.md", "model/recipe.yaml"),
    ),
    PACKAGE.parent: ("modeling_qlung/*.py", "modeling_qlung/inference/*.py"),
}


def space_files() -> dict[str, Path]:
    """Give what the Space consists of: name -> file.

    Raises:
        FileNotFoundError: a part of it is not there.
    """
    files = {}
    for folder, patterns in PATTERNS.items():
        for pattern in patterns:
            found = sorted(folder.glob(pattern))
            if not found:
                raise FileNotFoundError(f"{folder} holds no {pattern}: publish from a whole checkout")
            files.update({path.relative_to(folder).as_posix(): path for path in found})
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Upload the page, its model and what it needs of the package in one commit, as a Gradio Space."""
    parser = argparse.ArgumentParser("python space/publish.py", description=main.__doc__)
    parser.add_argument("--repo_id", help="USER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="make a Space that others may not see")
    parser.add_argument("--dry_run", action="store_true", help=f"write {WRITTEN}, upload nothing")
    args = parser.parse_args(argv)
    if not args.dry_run and args.repo_id is None:
        parser.error("give --repo_id USER/NAME to upload to, or --dry_run to write the folder alone")
    files = space_files()
    if args.dry_run:
        shutil.rmtree(WRITTEN, ignore_errors=True)
        for name, path in files.items():
            target = WRITTEN / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        print(f"Written: {WRITTEN}, {len(files)} files. Try it: python {WRITTEN / 'app.py'}")
        return
    try:
        space = Repository(args.repo_id, "space", private=args.private or None).create()
        replaced = ("model/", "modeling_qlung/", "sounds/")
        print(f"Uploaded: {space.push(dict(files), 'Publish the page and its model', replaced)}")
    except HubError as error:
        raise SystemExit(f"space/publish.py: error: {error}") from error


if __name__ == "__main__":
    main()
