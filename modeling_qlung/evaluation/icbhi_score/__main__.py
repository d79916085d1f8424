"""Publish the metric as an `evaluate` Space: `python -m modeling_qlung.evaluation.icbhi_score --repo_id USER/NAME`."""

import argparse
from pathlib import Path

from hf_datasets.hub import HubError, Repository

FOLDER = Path(__file__).parent
FILES = ("README.md", "app.py", "icbhi_score.py", "requirements.txt", "scores.py")


def space_files(repo_id: str) -> dict[str, bytes]:
    """Give what the Space consists of, with its own id in the examples: name -> content."""
    files = {name: (FOLDER / name).read_bytes() for name in FILES}
    return {**files, "README.md": files["README.md"].replace(b"USER/icbhi_score", repo_id.encode())}


def main() -> None:
    """Upload the metric as an `evaluate` Space, so that evaluate.load("USER/icbhi_score") finds it."""
    parser = argparse.ArgumentParser("python -m modeling_qlung.evaluation.icbhi_score", description=main.__doc__)
    parser.add_argument("--repo_id", required=True, help=f"USER/{FOLDER.name} on the Hub")
    parser.add_argument("--private", action="store_true", help="make a Space that others may not see")
    args = parser.parse_args()
    if args.repo_id.split("/")[-1] != FOLDER.name:
        parser.error(f"--repo_id {args.repo_id}: evaluate.load wants the module's own name, USER/{FOLDER.name}")
    try:
        space = Repository(args.repo_id, "space", private=args.private or None).create()
        print(f"Uploaded: {space.push(space_files(space.repo_id), 'Publish the ICBHI score')}")
    except HubError as error:
        raise SystemExit(f"icbhi_score: error: {error}") from error


if __name__ == "__main__":
    main()
