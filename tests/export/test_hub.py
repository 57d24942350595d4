"""Uploads with the hub's real client to a stand-in: every byte arrives in one commit, or nothing shows."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, serve
from huggingface_hub import constants
from small_manifest import FILES, manifest, small_artefact

from trimkv_edge.errors import ArtefactError, ConfigError, HubError
from trimkv_edge.export.hub import HubRepo, check_repo, push_artefact, retry_command

REPO = HubRepo("ada/small")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The stand-in speaks the older upload protocol only.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve(Hub()) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_artefact(tmp_path / "small")
    return tmp_path / "small"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_byte_arrives_in_one_commit(hub: Hub, folder: Path) -> None:
    want = contents(folder)
    (folder / "my-notes.txt").write_text("not part of the artefact")
    assert check_repo(REPO, hub.endpoint) == "ada"
    assert not hub.repos  # a check makes nothing
    address = push_artefact(folder, REPO, hub.endpoint)
    repo = hub.repos["ada/small"]
    assert {**FILES, "README.md": want["README.md"], "manifest.json": want["manifest.json"]} == want
    assert repo.files() == {**want, ".gitattributes": b"\n"}
    assert len(repo.branches["main"]) == 2
    assert repo.messages == ["qwen3-4b, policy trimkv, budget 1024: executorch, onnx"]
    assert not repo.private
    assert address == f"{hub.endpoint}/ada/small/commit/{repo.sha('main')}"
    assert set(hub.objects.values()) == {FILES[name] for name in FILES if name.endswith((".pte", ".onnx", ".data"))}


def test_a_private_repository_of_an_organisation(hub: Hub, folder: Path) -> None:
    repo = HubRepo("team/small", private=True)
    check_repo(repo, hub.endpoint)
    push_artefact(folder, repo, hub.endpoint)
    assert hub.repos["team/small"].private
    push_artefact(folder, repo, hub.endpoint)  # once more, into the private one that is there now
    assert len(hub.repos["team/small"].branches["main"]) == 3


def test_a_branch_leaves_main_alone(hub: Hub, folder: Path) -> None:
    repo = HubRepo("ada/small", revision="int4")
    check_repo(repo, hub.endpoint)
    push_artefact(folder, repo, hub.endpoint)
    assert hub.repos["ada/small"].files("int4").keys() >= contents(folder).keys()
    assert hub.repos["ada/small"].files().keys() == {".gitattributes"}


def test_an_artefact_replaces_an_older_one_and_leaves_other_files(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_artefact(folder, REPO, hub.endpoint)
    hub.repos["ada/small"].files()["picture.png"] = b"of the user"
    del hub.repos["ada/small"].files()["sub/more.json"]  # by the user
    fewer = {name: FILES[name] for name in ("decoder.onnx", "decoder.onnx.data", "evict.onnx")}
    small_artefact(tmp_path / "next", fewer)
    check_repo(REPO, hub.endpoint)
    push_artefact(tmp_path / "next", REPO, hub.endpoint)
    assert hub.repos["ada/small"].files() == {
        ".gitattributes": b"\n",
        "picture.png": b"of the user",
        **contents(tmp_path / "next"),
    }


@pytest.mark.parametrize(
    "files",
    [{"model.safetensors": b"weights"}, {"manifest.json": b'{"of": "something else"}'}, {"manifest.json": b"\xff[3]"}],
)
def test_a_repository_of_something_else_is_not_overwritten(hub: Hub, folder: Path, files: dict[str, bytes]) -> None:
    repo = hub.add("ada/small", files)
    for act in (lambda: check_repo(REPO, hub.endpoint), lambda: push_artefact(folder, REPO, hub.endpoint)):
        with pytest.raises(ConfigError, match=r"ada/small holds '.*' and no artefact: choose another name"):
            act()
    assert repo.files() == {".gitattributes": b"\n", **files}


def test_a_repository_with_only_a_card_is_as_good_as_new(hub: Hub, folder: Path) -> None:
    hub.add("ada/small", {"README.md": b"# soon"})
    check_repo(REPO, hub.endpoint)
    push_artefact(folder, REPO, hub.endpoint)
    assert hub.repos["ada/small"].files()["README.md"] == (folder / "README.md").read_bytes()


def test_private_cannot_be_had_from_a_public_repository(hub: Hub, folder: Path) -> None:
    hub.add("ada/small", {})
    with pytest.raises(ConfigError, match=r"exists and is public.*leave out --private"):
        check_repo(HubRepo("ada/small", private=True), hub.endpoint)


@pytest.mark.parametrize("name", ["small", "a/b/c", "ada/", "/small", "ada/sm all", "ada/..", "", "ada/x.git"])
def test_ids_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="give OWNER/NAME"):
        HubRepo(name)


def test_a_damaged_artefact_sends_nothing(hub: Hub, folder: Path) -> None:
    (folder / "model.pte").write_bytes(FILES["model.pte"][:-1] + b"!")
    with pytest.raises(ArtefactError, match=r"model\.pte has sha256"):
        push_artefact(folder, REPO, hub.endpoint)
    assert hub.requests == []


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"there is no token of the hub: make a token with write access.*hf auth login"):
        check_repo(REPO, hub.endpoint)
    assert hub.requests == []


def test_a_token_that_is_not_valid(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(HubError, match=r"does not accept the token \(401\).*HF_TOKEN"):
        check_repo(REPO, hub.endpoint)


def test_a_token_that_can_only_read(hub: Hub) -> None:
    hub.role = "read"
    with pytest.raises(HubError, match=r"'mine' can only read: make one with write access"):
        check_repo(REPO, hub.endpoint)


def test_a_token_of_somebody_else(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"belongs to ada, which cannot write to bob/: use one of ada, team"):
        check_repo(HubRepo("bob/small"), hub.endpoint)


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        (("POST", "/repos/create"), 403, r"may not write there \(403\) \(as the test wants\)"),
        (("POST", "/repos/create"), 401, r"does not accept the token \(401\)"),
        (("POST", "/validate-yaml"), 400, r"the hub's client refused: Invalid metadata in README.md"),
        (("POST", "/preupload/"), 403, r"may not write there \(403\)"),
        (("PUT", "/lfs-objects/"), 403, r"may not write there \(403\)"),
        (("POST", "/commit/"), 500, r"answered 500 .*: the hub has trouble, try again later"),
        (("POST", "/commit/"), 429, r"asks to wait \(429\)"),
    ],
)
def test_a_failed_upload_shows_nothing_and_says_how_to_go_on(
    hub: Hub, folder: Path, where: tuple[str, str], status: int, message: str
) -> None:
    before = contents(folder)
    hub.fail[where] = status
    with pytest.raises(HubError, match=message) as caught:
        push_artefact(folder, REPO, hub.endpoint)
    text = str(caught.value)
    assert text.endswith(f"the artefact is at {folder}, upload it with: trimkv-push {folder} ada/small")
    assert "\n" not in text
    assert TOKEN not in text
    if "ada/small" in hub.repos:
        assert hub.repos["ada/small"].files().keys() == {".gitattributes"}
    assert contents(folder) == before
    hub.fail.clear()
    push_artefact(folder, REPO, hub.endpoint)  # the advice works
    assert hub.repos["ada/small"].files() == {**before, ".gitattributes": b"\n"}


def test_trouble_of_the_hub_is_found_before_the_export(hub: Hub) -> None:
    hub.fail["GET", "/whoami-v2"] = 500
    with pytest.raises(HubError, match=r"checking the token .*answered 500"):
        check_repo(REPO, hub.endpoint)


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HubError, match=rf"{endpoint} cannot be reached \(\w+: .*check the network, or HF_ENDPOINT"):
            check_repo(REPO, endpoint)
        with pytest.raises(HubError, match=rf"{endpoint} cannot be reached .*upload it with: trimkv-push {folder} ada"):
            push_artefact(folder, REPO, endpoint)


def test_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set: unset it"):
        check_repo(REPO, hub.endpoint)
    assert hub.requests == []


def test_tokens_that_do_not_say_their_role(hub: Hub) -> None:
    hub.role = None
    assert check_repo(REPO, hub.endpoint) == "ada"


def test_the_retry_command_repeats_every_option() -> None:
    repo = HubRepo("ada/small", private=True, revision="int4")
    assert retry_command(Path("my models/small"), repo) == (
        "trimkv-push 'my models/small' ada/small --private --hub-revision int4"
    )


def test_what_arrives_is_an_artefact(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_artefact(folder, REPO, hub.endpoint)
    arrived = json.loads(hub.repos["ada/small"].files()["manifest.json"])
    want = replace(manifest(), files={})
    assert arrived["model"]["name"] == want.model.name
    assert set(arrived["files"]) == {*FILES, "README.md"}
