"""``trimkv-push``: an artefact that exists goes to the model hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_edge.cli.common import run_cli
from trimkv_edge.errors import ConfigError

if TYPE_CHECKING:
    from trimkv_edge.export.hub import HubRepo

_EPILOG = """\
examples:
  trimkv-push artefacts/tiny me/tiny-trimkv
  trimkv-push artefacts/qwen3-4b my-team/qwen3-4b-trimkv --private
  HF_TOKEN=hf_... trimkv-push artefacts/tiny me/tiny-trimkv --hub-revision int4

The files that the manifest lists go up in one commit, after their hashes were checked; a model card is among them. The
token is that of `hf auth login` or HF_TOKEN, with write access. Others run it with:
  hf download me/tiny-trimkv --local-dir tiny && trimkv-run tiny --prompt "Once upon a time"

exit codes: 0 done, 2 the artefact, the token or the hub is at fault, 130 interrupted (no half of it shows)
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trimkv-push",
        description="Upload an artefact to the model hub, in one commit.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT", help="folder that trimkv-export made")
    parser.add_argument("push_to_hub", metavar="OWNER/NAME", help="repository; made if it does not exist")
    add_hub_options(parser)
    return parser


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how to upload; the repository is ``push_to_hub``."""
    parser.add_argument("--private", action="store_true", help="make the hub's repository private")
    parser.add_argument("--hub-revision", metavar="BRANCH", help="branch of the hub's repository (default main)")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = build_parser().parse_args(argv)
    run_cli(lambda: _push(args))


def _push(args: argparse.Namespace) -> None:
    from trimkv_edge.manifest import load_manifest

    repo = hub_repo(args)
    assert repo is not None  # it is a positional argument
    load_manifest(args.artefact, verify_files=False)
    check_hub(repo)
    push(args.artefact, repo)


def hub_repo(args: argparse.Namespace) -> HubRepo | None:
    """Where to upload; None if that was not asked for.

    Raises:
        ConfigError: no repository id, or options that only make sense with one.
    """
    if args.push_to_hub is None:
        if args.private or args.hub_revision is not None:
            raise ConfigError("--private and --hub-revision are for uploads: give --push-to-hub OWNER/NAME too")
        return None
    from trimkv_edge.export.hub import MAIN, HubRepo

    return HubRepo(args.push_to_hub, args.private, MAIN if args.hub_revision is None else args.hub_revision)


def check_hub(repo: HubRepo) -> None:
    """Checks token and repository, and says who will upload."""
    from trimkv_edge.export.hub import check_repo

    user = check_repo(repo)
    print(f"hub       {repo.repo_id} ({repo.revision}), as {user}", flush=True)


def push(folder: Path, repo: HubRepo) -> None:
    """Uploads and says where it went; progress bars only on a terminal."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented, not in __all__

    from trimkv_edge.export.hub import push_artefact

    if not sys.stderr.isatty():
        disable_progress_bars()
    print(f"pushed    {push_artefact(folder, repo)}")


if __name__ == "__main__":
    main()
