"""Pictures in requests: what is said about them, who may share a cache, and what is let in."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_server import MODEL, Running, ask, running, said
from text_artefact import text_artefact
from vision_text_artefact import noise, png, vision_text_artefact

from trimkv_edge.errors import ConfigError
from trimkv_edge.runtime.artefact import Artefact
from trimkv_edge.runtime.conversation import Conversation
from trimkv_edge.runtime.server import pictures as module
from trimkv_edge.runtime.server.pictures import PictureSource
from trimkv_edge.runtime.server.store import Store
from trimkv_edge.runtime.session import Session
from trimkv_edge.runtime.vision import PictureReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that requests may name, beside one that they may not."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "shown" / "inner").mkdir(parents=True)
    noise(1).save(root / "shown" / "a.png")
    noise(2).save(root / "shown" / "inner" / "b c.png")
    noise(3).save(root / "secret.png")
    (root / "shown" / "link.png").symlink_to(root / "secret.png")
    (root / "shown" / "up").symlink_to(root)
    (root / "shown" / "again.png").symlink_to(root / "shown" / "a.png")
    return root / "shown"


def server_of(folder: Path, **settings: Any) -> Any:
    artefact = Artefact.load(vision_text_artefact())
    pictures = PictureSource(artefact.manifest.vision, folder)
    return running(folder=vision_text_artefact(), grammars=None, pictures=pictures, **settings)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with server_of(folder) as one:
        yield one


def data(seed: int, **size: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(noise(seed, **size))).decode()


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def look(words: str, *urls: str) -> dict[str, Any]:
    """A message that shows pictures before its words."""
    return {"role": "user", "content": [*map(image, urls), {"type": "text", "text": words}]}


def text_of(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def cached(reply: Any) -> int:
    return int(reply.usage.prompt_tokens_details.cached_tokens)


def answers(*turns: tuple[str, list[int]], count: int = 12) -> list[str]:
    """What a conversation without a server says to words and pictures."""
    artefact = Artefact.load(vision_text_artefact())
    reader, talk = PictureReader.of(artefact), Conversation.open(artefact, Session.open(artefact, "onnx", 1))
    out = []
    for words, seeds in turns:
        shown = [reader.image(png(noise(seed))) for seed in seeds]
        out.append("".join(piece.text for piece in talk.ask(words, count, shown=shown)))
    return out


def test_a_chat_about_pictures_says_what_a_conversation_says(server: Running) -> None:
    first, second, third = answers(("what is it?", [1]), ("and now?", []), ("which?", [2, 3]))
    history = [look("what is it?", data(1))]
    one = ask(server, history, "anna")
    history += [{"role": "assistant", "content": text_of(one)}, *said("and now?")]
    two = ask(server, history, "anna")
    history += [{"role": "assistant", "content": text_of(two)}, look("which?", data(2), data(3))]
    three = ask(server, history, "anna")
    assert [text_of(reply) for reply in (one, two, three)] == [first, second, third]
    # Nothing is read twice.
    assert cached(two) == one.usage.total_tokens
    assert cached(three) == two.usage.total_tokens
    assert one.usage.prompt_tokens > 6 + 2


def test_the_order_of_words_and_pictures_counts(server: Running) -> None:
    parts = [{"type": "text", "text": "what is"}, image(data(1)), {"type": "text", "text": "it?"}]
    between = ask(server, [{"role": "user", "content": parts}])
    before = ask(server, [{"role": "user", "content": [parts[1], parts[0], parts[2]]}])
    assert between.usage.prompt_tokens > 8
    assert text_of(between) != text_of(before)
    assert ask(server, [{"role": "user", "content": [image(data(1))]}]).usage.prompt_tokens > 8  # no words at all


@pytest.mark.parametrize("name", ["bert", None])
def test_the_same_words_about_another_picture_share_nothing(server: Running, name: str | None) -> None:
    """The next turn of a chat whose picture is another one: all its other words, answers too, are the same."""
    first = ask(server, [look("what is it?", data(1))], name)
    answer = {"role": "assistant", "content": text_of(first)}
    other = ask(server, [look("what is it?", data(4)), answer, *said("sure?")], name)
    assert cached(other) == 0
    same = ask(server, [look("what is it?", data(1)), answer, *said("sure?")], name)
    assert text_of(other) != text_of(same)
    fresh = ask(server, [look("what is it?", data(4)), answer, *said("sure?")], "someone else")
    assert text_of(other) == text_of(fresh)


def test_the_same_picture_from_another_place_is_the_same(server: Running, folder: Path) -> None:
    first = ask(server, [look("what is it?", "a.png")], "carla")
    answer = {"role": "assistant", "content": text_of(first)}
    again = ask(server, [look("what is it?", data(1)), answer, *said("sure?")], "carla")
    assert cached(again) == first.usage.total_tokens


def test_a_file_that_changed_is_another_picture(server: Running, folder: Path) -> None:
    noise(5).save(folder / "changing.png")
    first = ask(server, [look("what is it?", "changing.png")], "dora")
    noise(6).save(folder / "changing.png")
    answer = {"role": "assistant", "content": text_of(first)}
    assert cached(ask(server, [look("what is it?", "changing.png"), answer, *said("sure?")], "dora")) == 0


def test_displaced_chats_about_pictures_go_on_from_disk(folder: Path, tmp_path: Path) -> None:
    with server_of(folder, sessions=1, store=Store(tmp_path)) as server:
        histories: dict[int, list[Any]] = {}
        for seed in (1, 2):
            reply = ask(server, [look("what is it?", data(seed))])
            histories[seed] = [look("what is it?", data(seed)), {"role": "assistant", "content": text_of(reply)}]
        for seed in (1, 2):
            reply = ask(server, [*histories[seed], *said("sure?")])
            assert (text_of(reply), cached(reply) > 0) == (answers(("what is it?", [seed]), ("sure?", []))[1], True)


def test_turns_asked_again_go_back_behind_their_pictures(folder: Path) -> None:
    with server_of(folder, sessions=1, undo=2) as server:
        history = [*said("the cat")]
        history += [{"role": "assistant", "content": text_of(ask(server, history, "anna"))}]
        one = ask(server, [*history, look("what?", data(1))], "anna")
        again = ask(server, [*history, look("what?", data(1))], "anna")
        other = ask(server, [*history, look("what?", data(2))], "anna")
        assert (text_of(one), text_of(again)) == (answers(("the cat", []), ("what?", [1]))[1],) * 2
        assert text_of(other) == answers(("the cat", []), ("what?", [2]))[1]
        assert min(map(cached, (one, again, other))) > 0


@pytest.mark.parametrize("url", ["a.png", "inner/b c.png", "again.png", "inner/../a.png", "./a.png"])
def test_files_inside_the_folder_may_be_named(server: Running, folder: Path, url: str) -> None:
    seed = 2 if "b c" in url else 1
    assert text_of(ask(server, [look("it", url)])) == answers(("it", [seed]))[0]
    as_url = (folder / url).as_uri() if ".." not in url else f"file://localhost{folder}/{url}"
    assert text_of(ask(server, [look("it", as_url)])) == answers(("it", [seed]))[0]
    assert text_of(ask(server, [look("it", str(folder / url))])) == answers(("it", [seed]))[0]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("../secret.png", "image 1 lies outside the folder of --image-folder"),
        ("link.png", "image 1 lies outside the folder"),
        ("up/secret.png", "image 1 lies outside the folder"),
        ("/etc/passwd", "image 1 lies outside the folder"),
        ("file:///etc/passwd", "image 1 lies outside the folder"),
        ("file:///%2e%2e/etc/passwd", "image 1 lies outside the folder"),
        ("inner%2f..%2f..%2fsecret.png", "image 1 does not exist"),
        ("file://elsewhere/a.png", "image 1 lies on another server"),
        ("a\0.png", "image 1 has a path that is none"),
        ("\ud800.png", "unable to parse raw data as a unicode string"),
        ("nothing.png", "image 1 does not exist"),
        ("inner", "image 1 is a folder or a device"),
        ("https://example.com/a.png", "image 1 lies on another server, and nothing is fetched from there"),
        ("HTTP://example.com/a.png", "image 1 lies on another server, and nothing is fetched from there"),
        ("ftp://example.com/a.png", "image 1 has a URL of kind 'ftp'"),
        ("data:image/png,abc", "data: URL of another form"),
        ("data:image/png;base64", "data: URL of another form"),
        ("data:image/png;base64,a*b=", "data: URL that is not base64"),
        ("data:image/png;base64,ü", "data: URL that is not base64"),
        ("data:image/png;base64,", "image 1 is empty"),
        ("data:image/png;base64,aGVsbG8=", "image 1 is not PNG, JPEG, WebP, GIF or BMP"),
        (data(1)[:-400], "image 1 is damaged"),
        (data(1, width=402, height=2), "too narrow"),
    ],
)
def test_what_is_no_picture_or_not_let_in_is_400(server: Running, url: str, told: str) -> None:
    body = {"model": MODEL, "messages": [look("it", url)], "max_tokens": 1}
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps(body), headers=headers)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    assert told in error["message"]
    assert "secret" not in error["message"]
    assert "/etc" not in error["message"]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([look("a <|image_pad|> b")], "the text contains <|image_pad|>"),
        ([look("a <|video_pad|> b", data(1))], "the text contains <|video_pad|>"),
        ([*said("a <|image_pad|>", "b", "c")], "the text contains <|image_pad|>"),
        ([*said("a", "b <|image_pad|>", "c")], "the text contains <|image_pad|>"),
        ([{"role": "user", "content": 3}], "messages.0.content.text is 3: Input should be a valid string"),
        ([{"role": "system", "content": [image(data(1))]}, *said("a")], "messages of role system show no images"),
        ([look("a"), {"role": "assistant", "content": [image(data(1))]}, *said("a")], "messages of role assistant"),
        ([{"role": "user", "content": [image(data(1), detail="high")]}], "detail is 'high': Input should be 'auto'"),
        (
            [{"role": "user", "content": [image(data(1), width=3)]}],
            "width is not supported: leave it out; allowed are url",
        ),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}], "'text', 'image_url'"),
        ([look("a", *map(data, range(100, 133)))], "33 images in one request, but at most 32 are read"),
    ],
)
def test_messages_that_cannot_be_shown_are_400(server: Running, messages: list[Any], told: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        ask(server, messages)
    assert told in found.value.body["message"]  # type: ignore[index]


def test_a_refused_message_leaves_the_chat_as_it_was(server: Running) -> None:
    first = ask(server, said("the cat"), "emil")
    history = [*said("the cat", text_of(first))]
    for wrong in (look("a <|image_pad|> b"), look("it", data(1)[:-400]), look("it", "nothing.png")):
        with pytest.raises(openai.BadRequestError):
            ask(server, [*history, wrong], "emil")
    assert cached(ask(server, [*history, look("it", data(1))], "emil")) == first.usage.total_tokens


def test_completions_read_text_only(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="1 places for images"):
        server.client.completions.create(model=MODEL, prompt="a <|image_pad|>")


def test_text_models_refuse_images() -> None:
    with running(1) as server:
        with pytest.raises(openai.BadRequestError, match="this model reads text only: leave images out"):
            ask(server, [look("it", data(1))])
        assert ask(server, [{"role": "user", "content": [{"type": "text", "text": "<|image_pad|>"}]}])


def test_without_a_folder_no_file_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = Artefact.load(vision_text_artefact()).manifest.vision
    with running(1, folder=vision_text_artefact(), grammars=None, pictures=PictureSource(vision)) as server:
        for url in ("a.png", "file:///etc/passwd", "/etc/passwd"):
            with pytest.raises(openai.BadRequestError, match="started without --image-folder"):
                ask(server, [look("it", url)])
        monkeypatch.setattr(module, "LIMITS", module.PictureLimits(file_bytes=100))
        with pytest.raises(openai.BadRequestError, match="image 1 is larger than 100 B"):
            ask(server, [look("it", data(1))])


def test_bodies_may_be_larger_where_pictures_are_read(server: Running) -> None:
    body = {"model": MODEL, "messages": said("x" * 9 * 2**20), "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json={**body, "messages": []}).status_code == 400
    large = httpx.post(f"{server.url}/v1/chat/completions", content=b" " * (49 * 2**20))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
    with running(1) as text_server:
        assert httpx.post(f"{text_server.url}/v1/chat/completions", content=b" " * 9 * 2**20).status_code == 413


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    vision = Artefact.load(vision_text_artefact()).manifest.vision
    with pytest.raises(ConfigError, match="does not exist"):
        PictureSource(vision, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="reads text only"):
        PictureSource(Artefact.load(text_artefact()).manifest.vision, tmp_path)


def test_internal_errors_stay_inside(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        ask(server, [look("it", data(1))])
    assert not caplog.records
