"""Options of commands that show pictures to a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_edge.errors import ConfigError

if TYPE_CHECKING:
    from trimkv_edge.runtime.artefact import Artefact
    from trimkv_edge.runtime.vision import Shown


def add_pictures(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Images and videos, in ``args.pictures`` as they were given; None: none. Returns the group of the options."""
    group = parser.add_argument_group("pictures, for models that read them (docs/vision.md)")
    add = group.add_argument
    add(
        "--image",
        action="append",
        dest="pictures",
        type=lambda path: ("image", Path(path)),
        metavar="FILE",
        help="PNG, JPEG, WebP, GIF or BMP that stands before the prompt; may be given again, order counts",
    )
    add(
        "--video",
        action="append",
        dest="pictures",
        type=lambda path: ("video", Path(path)),
        metavar="PATH",
        help="a folder of frames, in the order of their names, or an animated GIF, WebP or PNG; may be given again",
    )
    add_video(group)
    return group


def add_video(parser: argparse._ActionsContainer) -> None:
    """How videos become frames."""
    add = parser.add_argument
    add(
        "--video-fps",
        type=float,
        metavar="X",
        help="frames to show for a second (default 2); of a folder: how many are one",
    )
    add("--video-frames", type=int, metavar="N", help="most frames of a video (default 768), evenly spread")


def add_order(parser: argparse._ActionsContainer) -> None:
    """Where pictures stand."""
    parser.add_argument("--pictures-last", action="store_true", help="show pictures behind the words of their message")


def video_settings(args: argparse.Namespace) -> tuple[float, int]:
    """``--video-fps`` and ``--video-frames``, or what stands for them."""
    from trimkv_edge.runtime.vision_frames import FPS, MOST_FRAMES

    return (
        FPS if args.video_fps is None else args.video_fps,
        MOST_FRAMES if args.video_frames is None else args.video_frames,
    )


def read_pictures(args: argparse.Namespace, artefact: Artefact) -> list[Shown]:
    """All that were given, checked.

    Raises:
        ConfigError: a text model, or settings without what they are for.
        PictureError: a file that cannot be read; nothing was shown.
    """
    given = args.pictures or []
    fps, most = video_settings(args)
    if not any(kind == "video" for kind, _ in given) and (args.video_fps, args.video_frames) != (None, None):
        raise ConfigError("--video-fps and --video-frames are for --video, which is not given: leave them out")
    if not given and args.pictures_last:
        raise ConfigError("--pictures-last is for --image and --video, which are not given: leave it out")
    if not given:
        return []
    from trimkv_edge.runtime.vision import PictureReader

    reader = PictureReader.of(artefact)
    return [reader.image(path) if kind == "image" else reader.video(path, fps, most) for kind, path in given]
