"""Uploads an artefact to the model hub with the hub's own client: one commit, or nothing."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_edge.errors import ConfigError, HubError, TrimKVError
from trimkv_edge.manifest import MANIFEST_FILE, Manifest, load_manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

MAIN = "main"
_HARMLESS = {".gitattributes", "README.md", "LICENSE"}  # a repository that holds no more is as good as new


@dataclass(frozen=True)
class HubRepo:
    """Where an artefact goes.

    Attributes:
        repo_id: ``OWNER/NAME``.
        private: make the repository private; one that exists must be so already.
        revision: branch, made if it does not exist.

    Raises:
        ConfigError: not such an id.
        TrimKVError: huggingface_hub is not installed.
    """

    repo_id: str
    private: bool = False
    revision: str = MAIN

    def __post_init__(self) -> None:
        if find_spec("huggingface_hub") is None:
            raise TrimKVError("uploading needs huggingface_hub: pip install 'trimkv-edge[export]'")
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

        try:
            validate_repo_id(self.repo_id)
            named = self.repo_id.count("/") == 1
        except HFValidationError:
            named = False
        if not named:
            raise ConfigError(
                f"{self.repo_id!r} is not a repository of the hub: give OWNER/NAME, where OWNER is your user name or "
                "an organisation (letters, digits, '-', '_' and '.')"
            )
        if not self.revision:
            raise ConfigError("the hub revision is empty: give the name of a branch, or leave it out")

    @property
    def owner(self) -> str:
        return self.repo_id.partition("/")[0]


def check_repo(repo: HubRepo, endpoint: str | None = None) -> str:
    """Checks what can be checked before there is anything to upload.

    Args:
        repo: where the artefact will go.
        endpoint: of the hub; default: ``HF_ENDPOINT`` or the public hub.

    Returns:
        The user whose token it is.

    Raises:
        ConfigError: the repository holds something else than an artefact, or is public and should be private.
        HubError: no token, one that is not valid or may not write there, or the hub cannot be reached.
    """
    api = _api(endpoint)
    with _hub_errors(api, repo, "checking the token"):
        who: dict[str, Any] = api.whoami()
    user = str(who["name"])
    owners = [user, *(str(group["name"]) for group in who.get("orgs") or [])]
    if repo.owner not in owners:
        raise HubError(
            f"the hub's token belongs to {user}, which cannot write to {repo.owner}/: use one of {', '.join(owners)} "
            "as the owner, or another token (hf auth login, or HF_TOKEN)"
        )
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(
            f"the hub's token {token.get('displayName', '')!r} can only read: make one with write access at "
            f"{api.endpoint}/settings/tokens, then hf auth login or HF_TOKEN"
        )
    with _hub_errors(api, repo, "looking at the repository"):
        _check_existing(api, repo, repo.revision)
    return user


def push_artefact(folder: Path, repo: HubRepo, endpoint: str | None = None) -> str:
    """Uploads the files that the manifest lists, and the manifest, in one commit.

    Files of an artefact that was in the repository before, and that this one lacks, are deleted in the same commit.
    Others are left alone.

    Args:
        folder: a finished artefact; its hashes are checked first.
        repo: made if it does not exist.
        endpoint: as :func:`check_repo`.

    Returns:
        Address of the commit.

    Raises:
        ArtefactError: the artefact is damaged; nothing was sent.
        ConfigError: as :func:`check_repo`.
        HubError: an upload failed. The repository shows either all of the artefact or what it showed before.
    """
    manifest = load_manifest(folder)
    api = _api(endpoint)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [*manifest.files, MANIFEST_FILE]
    with _hub_errors(api, repo, "uploading", retry=folder):
        api.create_repo(repo.repo_id, private=repo.private or None, exist_ok=True)
        if repo.revision != MAIN:
            api.create_branch(repo.repo_id, branch=repo.revision, exist_ok=True)
        old = _check_existing(api, repo, repo.revision)
        # Not upload_folder: that makes several commits of a large folder, and would send whatever else lies there.
        commit = api.create_commit(
            repo.repo_id,
            [
                *(CommitOperationAdd(name, str(folder / name)) for name in names),
                *(CommitOperationDelete(name) for name in sorted(old - set(names))),
            ],
            commit_message=_message(manifest),
            revision=repo.revision,
        )
    return str(commit.commit_url)


def retry_command(folder: Path, repo: HubRepo) -> str:
    """The command that uploads an artefact that exists."""
    words = ["trimkv-push", str(folder), repo.repo_id, *(["--private"] if repo.private else [])]
    return shlex.join(words + (["--hub-revision", repo.revision] if repo.revision != MAIN else []))


def _message(manifest: Manifest) -> str:
    name = Path(manifest.model.name).name
    return f"{name}, policy {manifest.cache.policy}, budget {manifest.cache.budget}: {', '.join(manifest.targets)}"


def _api(endpoint: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, library_name="trimkv-edge")


def _check_existing(api: HfApi, repo: HubRepo, revision: str) -> set[str]:
    """Files of the artefact that the repository holds now, empty if it or the branch does not exist.

    Raises:
        ConfigError: it holds something else, or its visibility is not what was asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(repo.repo_id)
    except RepositoryNotFoundError:
        return set()
    if repo.private and not info.private:
        raise ConfigError(
            f"{repo.repo_id} exists and is public: make it private in its settings, choose another name, or leave out "
            "--private"
        )
    if revision != MAIN:
        with suppress(RevisionNotFoundError):  # a new branch begins as a copy of main
            info = api.model_info(repo.repo_id, revision=revision)
    present = {file.rfilename for file in info.siblings or []}
    files = _listed(api, repo, str(info.sha)) if MANIFEST_FILE in present else None
    if files is None and present - _HARMLESS:
        raise ConfigError(
            f"{repo.repo_id} holds {sorted(present - _HARMLESS)[0]!r} and no artefact: choose another name, so that "
            "nothing of it is lost"
        )
    return (files or set()) & present


def _listed(api: HfApi, repo: HubRepo, revision: str) -> set[str] | None:
    """What the manifest in the repository lists, itself included; None if it is not a manifest of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo.repo_id, MANIFEST_FILE, revision=revision, local_dir=folder)
        try:
            manifest = json.loads(Path(path).read_text(encoding="utf-8"))
            return {*map(str, manifest["files"]), MANIFEST_FILE} if "schema_version" in manifest else None
        except (ValueError, KeyError, TypeError):
            return None


@contextmanager
def _hub_errors(api: HfApi, repo: HubRepo, doing: str, retry: Path | None = None) -> Iterator[None]:
    """Turns every failure of the hub's client into one :class:`HubError` that says what to do."""
    try:
        yield
    except TrimKVError:
        raise
    except Exception as error:  # the client's own, its transport's and plain ones share no base class
        then = "" if retry is None else f"; the artefact is at {retry}, upload it with: {retry_command(retry, repo)}"
        raise HubError(f"{doing} ({repo.repo_id}): {_reason(error, api.endpoint)}{then}") from error


def _reason(error: BaseException, endpoint: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    login = f"make a token with write access at {endpoint}/settings/tokens, then run hf auth login or set HF_TOKEN"
    last: BaseException | None = error
    while last is not None:
        if isinstance(last, LocalTokenNotFoundError):
            return f"there is no token of the hub: {login}"
        if isinstance(last, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it to reach the hub"
        if isinstance(last, HfHubHTTPError):
            return _refused(last, login)
        if isinstance(last, json.JSONDecodeError):
            return f"{endpoint} gave an answer that makes no sense: try again later, or check HF_ENDPOINT"
        if isinstance(last, ValueError):
            return f"the hub's client refused: {_line(last)}"
        error, last = last, last.__cause__
    return f"{endpoint} cannot be reached ({type(error).__name__}: {_line(error)}): check the network, or HF_ENDPOINT"


def _refused(error: HfHubHTTPError, login: str) -> str:
    status = error.response.status_code
    said = f" ({' '.join(error.server_message.split())})" if error.server_message else ""
    if status == 401:
        return f"the hub does not accept the token (401): {login}"
    if status == 403:
        return f"the token may not write there (403){said}: {login}"
    if status == 429:
        return "the hub asks to wait (429): try again later"
    again = "the hub has trouble, try again later" if status >= 500 else "check the name and the token"
    return f"the hub answered {status}{said}: {again}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
