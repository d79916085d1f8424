"""Uploading to the Hugging Face Hub: the named files and no others, in one commit, errors in one sentence."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id


class HubError(Exception):
    """What kept an upload from happening, and what to do, in a sentence."""


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub, whether it is there yet or not.

    Args:
        repo_id: `USER/NAME`; a bare `NAME` is one of the token's owner.
        kind: what it holds.
        token: with write access; None: the one that `hf auth login` or the environment variable HF_TOKEN left.
        private: whether others may not see it; None: the owner's default.
        revision: branch to upload to; None: `main`.

    Raises:
        HubError: the id is none, or there is no token.
    """

    repo_id: str
    kind: Literal["model", "dataset", "space"]
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise HubError(
                f"{self.repo_id!r} is no repository id: give USER/NAME, of letters, digits, '-', '_' and '.' ({error})"
            ) from error
        if not (self.token or get_token()):
            raise HubError("there is no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN")

    def create(self) -> "Repository":
        """Make the repository where it is not there yet; gives it with its full id.

        Before long work, so that a wrong token or name is told at its beginning.

        Raises:
            HubError: the Hub cannot be reached or refuses, or the repository is to be private and is public.
        """
        api = HfApi(token=self.token)
        with self._explained():
            sdk = "gradio" if self.kind == "space" else None
            url = api.create_repo(self.repo_id, repo_type=self.kind, private=self.private, exist_ok=True, space_sdk=sdk)
            # Of a repository that was there, neither the call nor a commit changes who may see it.
            public = self.private and not api.repo_info(url.repo_id, repo_type=self.kind).private
            if self.revision:
                api.create_branch(url.repo_id, branch=self.revision, repo_type=self.kind, exist_ok=True)
        if public:
            raise HubError(f"{url.repo_id} is there already, and is public: make it private first, or choose another")
        return replace(self, repo_id=url.repo_id)

    def push(self, files: Mapping[str, Path | bytes], message: str, replaced: tuple[str, ...] = ()) -> str:
        """Upload files in one commit to a repository that is there.

        `HfApi.upload_folder` makes several where hf_xet is installed, and a reader in between would find half of it.

        Args:
            files: path in the repository -> file, or its content.
            message: of the commit.
            replaced: folders, each with a "/" at its end, of which nothing but `files` is to stay.

        Returns:
            Address of the commit; of the latest one, where nothing has changed.

        Raises:
            HubError: the Hub cannot be reached or refuses.
        """
        api = HfApi(token=self.token)
        with self._explained():
            there = api.list_repo_files(self.repo_id, repo_type=self.kind, revision=self.revision) if replaced else []
            stale = [name for name in there if name.startswith(replaced) and name not in files]
            commit = api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(name, content) for name, content in files.items()),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=message,
                repo_type=self.kind,
                revision=self.revision,
            )
        return commit.commit_url

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except HfHubHTTPError as error:
            status, said = error.response.status_code, error.server_message or error.response.reason_phrase
            advice = {
                401: "log in again with `hf auth login`, or set HF_TOKEN to a valid token",
                403: "use a token with write access, or another name",
            }.get(status, "try again later")
            raise HubError(
                f"the Hub refuses the {self.kind} {self.repo_id} (HTTP {status}, {said}): {advice}"
            ) from error
        except Exception as error:  # huggingface_hub, its HTTP client and hf_xet raise many kinds
            cause = error.__cause__ or error
            raise HubError(
                f"{self.repo_id} could not be uploaded to {HfApi().endpoint} ({type(cause).__name__}: "
                f"{' '.join(str(cause).split())}): give the same command again when that is mended"
            ) from error
