"""Uploading to the Hub: one commit of exactly the named files, and errors that a person can act on."""

import socket

import pytest

from hf_datasets.hub import HubError, Repository
from tests.hub_stand_in import TOKEN, HubStandIn


def test_one_commit_holds_exactly_the_named_files(hub: HubStandIn, tmp_path):
    (tmp_path / "large.parquet").write_bytes(b"PAR1" * 1000)
    (tmp_path / "stranger.txt").write_text("not named")
    repository = Repository("me/data", "dataset").create()
    repository.push({"a/large.parquet": tmp_path / "large.parquet", "a/small.txt": b"small"}, "First")
    there = hub.repositories["datasets/me/data"]
    assert there.files == {"a/large.parquet": b"PAR1" * 1000, "a/small.txt": b"small"}
    assert [commit["summary"] for commit in there.commits] == ["First"]


def test_what_is_replaced_goes_in_the_same_commit_and_nothing_else_does(hub: HubStandIn):
    repository = Repository("me/data", "dataset").create()
    repository.push({"a/0-of-2": b"0", "a/1-of-2": b"1", "own.txt": b"kept", "ab/kept": b"kept"}, "First")
    repository.push({"a/0-of-1": b"01"}, "Second", replaced=("a/",))
    there = hub.repositories["datasets/me/data"]
    assert there.files == {"a/0-of-1": b"01", "own.txt": b"kept", "ab/kept": b"kept"}
    assert there.commits[-1]["paths"] == {"a/0-of-1": "added", "a/0-of-2": "deleted", "a/1-of-2": "deleted"}
    assert len(there.commits) == 2


def test_the_same_again_makes_no_commit(hub: HubStandIn):
    repository = Repository("me/model", "model").create()
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n", "model.safetensors": b"weights"}
    address = repository.push(files, "First")
    assert repository.push(files, "Second") == address
    assert len(hub.repositories["models/me/model"].commits) == 1


def test_a_bare_name_is_one_of_the_owner_and_a_branch_is_made(hub: HubStandIn):
    repository = Repository("model", "model", private=True, revision="trial").create()
    assert repository.repo_id == "me/model"
    repository.push({"x.txt": b"x"}, "First")
    there = hub.repositories["models/me/model"]
    assert there.private
    assert there.branches == {"main": {}, "trial": {"x.txt": b"x"}}


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/two words", "me/dots..", "", "datasets/me/data", "me/x.git"])
def test_what_is_no_repository_id(repo_id):
    with pytest.raises(HubError, match=r"is no repository id: give USER/NAME"):
        Repository(repo_id, "dataset", token=TOKEN)


def test_no_token(monkeypatch):
    monkeypatch.setattr("hf_datasets.hub.get_token", lambda: None)
    with pytest.raises(HubError, match="there is no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN"):
        Repository("me/data", "dataset")


def test_a_wrong_token_and_another_users_name(hub: HubStandIn):
    with pytest.raises(HubError, match=r"refuses the dataset me/data \(HTTP 401.*log in again") as caught:
        Repository("me/data", "dataset", token="hf_wrong").create()
    assert "hf_wrong" not in str(caught.value) + repr(Repository("me/data", "dataset", token="hf_wrong"))
    with pytest.raises(HubError, match=r"\(HTTP 403.*write access, or another name"):
        Repository("you/data", "dataset").create()
    assert not hub.repositories


def test_what_is_public_is_not_taken_for_private(hub: HubStandIn):
    Repository("me/data", "dataset").create()
    with pytest.raises(HubError, match="me/data is there already, and is public"):
        Repository("me/data", "dataset", private=True).create()


def test_an_invalid_card_is_refused_before_anything_is_sent(hub: HubStandIn):
    repository = Repository("me/model", "model").create()
    with pytest.raises(HubError, match=r"Invalid metadata.*'mine'"):
        repository.push({"README.md": b"---\nlicense: mine\n---\n", "model.safetensors": b"weights"}, "First")
    assert not hub.large
    assert not hub.repositories["models/me/model"].commits


def test_no_network_and_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        Repository("me/data", "dataset", token=TOKEN).create()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    with pytest.raises(
        HubError, match=rf"me/data could not be uploaded to {address} \(ConnectError: .*the same command"
    ):
        Repository("me/data", "dataset", token=TOKEN).create()
