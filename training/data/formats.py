"""Conversations from the forms that data comes in; what does not fit one of them is refused, never guessed.

- messages: {"messages": [{"role", "content"}]}, content a string or a list of parts, as OpenAI and Hugging Face have
  it; in strings `<image>` takes the next of the record's "images".
- LLaVA, ShareGPT: {"conversations": [{"from", "value"}], "image": path or list}, `<image>` likewise.
- LLaMA-Factory's "system" beside either: a system message before the others.
- questions: {"picture": path, "questions": [[question, answer], ...]}, independent questions about one picture.
- captions: in a shard, a picture with its .txt: the picture without words, and the text as the answer to it.

A message with "learn": false (or "weight": 0, as OpenAI has it) is not learned; of the others, the assistant's are.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sail_model.chat import IMAGE_PLACEHOLDER
from sail_model.tokenizer import ADDED_TOKENS, IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from training.data.conversation import Conversation, Part, Picture, Role, Text, Turn

# what words may not hold: it stands for a picture, or ends a turn
RESERVED = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
assert all(token in ADDED_TOKENS for token in RESERVED)
WANTED = (
    'want {"messages": [{"role": ..., "content": ...}]}, {"conversations": [{"from": ..., "value": ...}]} or'
    ' {"picture": path, "questions": [[question, answer], ...]}'
)
FORMS = ("questions", "messages", "conversations")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_FRAME_TILES = 1  # a frame of a video is one tile


class Pictures:
    """The pictures that a record names apart from its text, in the order in which `<image>` takes them."""

    def __init__(self, sources: Sequence[Path | bytes]) -> None:
        self._left = list(sources)

    def take(self) -> Picture:
        """The next one."""
        if not self._left:
            raise ValueError(f"more {IMAGE_PLACEHOLDER} than pictures")
        return Picture(self._left.pop(0))

    def check_all_taken(self) -> None:
        """A picture that no text shows would be lost."""
        if self._left:
            raise ValueError(f"{len(self._left)} pictures more than {IMAGE_PLACEHOLDER}")


def conversation_of(record: Any, folder: Path | None, where: str, pictures: Sequence[bytes] = ()) -> Conversation:
    """The record's conversation. `folder` is where relative paths start; `pictures` are those stored beside the record.

    Raises ValueError with what is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError(f"no object; {WANTED}")
    if "questions" in record:
        return _questions(record, folder, where, pictures)
    for name, read in (("messages", _message), ("conversations", _llava_message)):
        if name in record:
            return _dialogue(record, name, read, folder, where, pictures)
    raise ValueError(f"got {', '.join(map(str, record)) or 'nothing'}; {WANTED}")


def is_conversation(record: Any) -> bool:
    """Whether it has one of the forms; else, beside a caption, it is metadata."""
    return isinstance(record, dict) and any(name in record for name in FORMS)


def captioned(pictures: Sequence[bytes], captions: Sequence[bytes], where: str) -> Conversation:
    """The one picture shown, its one caption learned, without the white space around it. Raises ValueError."""
    if len(pictures) != 1 or len(captions) != 1:
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} .txt, want one caption of one picture")
    caption = captions[0].decode("utf-8-sig").strip()
    if not caption:
        raise ValueError("the caption is empty")
    turns = (Turn("user", (Picture(pictures[0]),)), Turn("assistant", (words(caption),), learn=True))
    return Conversation(turns, where=where)


def _dialogue(
    record: dict[str, Any], name: str, read: Any, folder: Path | None, where: str, stored: Sequence[bytes]
) -> Conversation:
    messages = record[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is no list with at least one message")
    if any(record.get(name) for name in ("video", "videos")):
        raise ValueError('a video file; want its frames, in a part {"type": "video", "frames": [path, ...]}')
    pictures = Pictures([*_named_pictures(record, folder), *stored])
    turns = tuple(read(message, pictures, folder) for message in messages)
    if system := record.get("system"):
        turns = (Turn("system", (words(system),)), *turns)
    pictures.check_all_taken()
    _check_turns(turns)
    return Conversation(turns, where=where)


def _check_turns(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            raise ValueError(f"message {number + 1}: a system message comes first or not at all")
        if turn.role != "user" and any(isinstance(part, Picture) for part in turn.parts):
            raise ValueError(f"message {number + 1}: a picture in what the {turn.role} says; want it in the user's")
    if not any(turn.learn for turn in turns):
        raise ValueError("nothing to learn: no message of the assistant, or none that may be learned")


def _named_pictures(record: dict[str, Any], folder: Path | None) -> Iterator[Path | bytes]:
    """Of "image" and "images", each a path or a list of them."""
    for name in ("image", "images"):
        named = record.get(name)
        if named is None:
            continue
        for entry in named if isinstance(named, list) else [named]:
            yield picture_source(entry, folder)


def picture_source(entry: Any, folder: Path | None) -> Path | bytes:
    """A path; or {"path"}, {"bytes"}, {"base64"}, {"url": "data:..."}; nothing is ever downloaded."""
    if isinstance(entry, dict):
        if isinstance(entry.get("bytes"), bytes):
            return bytes(entry["bytes"])
        if isinstance(entry.get("base64"), str):
            return _decoded(entry["base64"])
        entry = entry.get("path") or entry.get("url") or entry.get("image")
    if not isinstance(entry, str) or not entry:
        raise ValueError("a picture is no path")
    if entry.startswith("data:"):
        return _decoded(entry)
    if entry.startswith(("http://", "https://")):
        raise ValueError(f"a picture at {entry[:60]}: want a file; download it first")
    path = Path(entry.removeprefix("file://"))
    if folder is None and not path.is_absolute():
        raise ValueError(f"a picture at the relative path {path}: its record is in a shard; want it beside the record")
    return path if folder is None else folder / path


def _decoded(text: str) -> bytes:
    """White space in it is left out: many encoders break lines."""
    encoded = text.partition("base64,")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"a picture's base64: {error}") from error


def _message(message: Any, pictures: Pictures, folder: Path | None) -> Turn:
    role, content, learn = _fields(message, "role", "content")
    if isinstance(content, str):
        return Turn(role, tuple(_split(content, pictures)), learn)
    if not isinstance(content, list):
        raise ValueError("content is neither text nor a list of parts")
    return Turn(role, tuple(part for entry in content for part in _parts(entry, pictures, folder)), learn)


def _llava_message(message: Any, pictures: Pictures, folder: Path | None) -> Turn:
    role, value, learn = _fields(message, "from", "value")
    if not isinstance(value, str):
        raise ValueError("value is no text")
    return Turn(role, tuple(_split(value, pictures)), learn)


def _fields(message: Any, role_name: str, content_name: str) -> tuple[Role, Any, bool]:
    if not isinstance(message, dict):
        raise ValueError(f"{message!r:.60} is no message")
    role = _ROLES.get(str(message.get(role_name)))
    if role is None:
        raise ValueError(f"{role_name} is {message.get(role_name)!r:.30}, want one of {', '.join(_ROLES)}")
    if content_name not in message:
        raise ValueError(f"a message has no {content_name}")
    weight, learn = message.get("weight", 1), message.get("learn", True)
    if weight not in (0, 1) or not isinstance(learn, bool):
        raise ValueError(f"learn is {learn!r}, weight {weight!r}; want true or false, 0 or 1")
    return role, message[content_name], role == "assistant" and learn and weight == 1


def _split(text: str, pictures: Pictures) -> Iterator[Part]:
    """Text in which `<image>` stands for pictures. One line break behind it belongs to it: the chat format has one."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    if first:
        yield words(first)
    for piece in rest:
        yield pictures.take()
        if piece := piece.removeprefix("\n"):
            yield words(piece)


def _parts(entry: Any, pictures: Pictures, folder: Path | None) -> Iterator[Part]:
    """Of one entry of a list of parts."""
    if isinstance(entry, str):
        yield words(entry)
        return
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind == "text" and isinstance(entry.get("text"), str):
        if entry["text"]:
            yield words(entry["text"])
    elif kind == "image":
        given = {name: entry[name] for name in ("image", "path", "url", "base64", "bytes") if name in entry}
        yield Picture(picture_source(given, folder)) if given else pictures.take()
    elif kind == "image_url":
        named = entry.get("image_url")
        yield Picture(picture_source(named if isinstance(named, dict) else {"url": named}, folder))
    elif kind == "video" and isinstance(entry.get("frames"), list) and entry["frames"]:
        for number, frame in enumerate(entry["frames"], start=1):
            yield Text(f"Frame-{number}: ")
            yield Picture(picture_source(frame, folder), max_tiles=_FRAME_TILES)
    else:
        raise ValueError(f"a part of type {kind!r}: want text, image, image_url, or video with frames")


def words(text: Any) -> Text:
    """Text without the tokens that stand for something else."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.60} is no text")
    if found := [token for token in (*RESERVED, IMAGE_PLACEHOLDER) if token in text]:
        raise ValueError(f"{text!r:.60} holds {found[0]}, which stands for something else than words")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write it, no tokenizer can read it
        raise ValueError(f"{text!r:.60} holds half a character: {error.reason}") from error
    return Text(text)


def _questions(record: dict[str, Any], folder: Path | None, where: str, stored: Sequence[bytes]) -> Conversation:
    questions = record["questions"]
    sources: list[Path | bytes] = [*stored]
    if record.get("picture") is not None:
        sources = [picture_source(record["picture"], folder), *stored]
    if len(sources) != 1:
        raise ValueError(f"{len(sources)} pictures, want one: picture is its path")
    if not isinstance(questions, list) or not questions:
        raise ValueError("questions is no list with at least one question")
    branches = []
    for pair in questions:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise ValueError(f"{pair!r:.60} is no pair of texts, question and answer")
        branches.append((Turn("user", (words(pair[0]),)), Turn("assistant", (words(pair[1]),), learn=True)))
    return Conversation((Turn("user", (Picture(sources[0]),)),), tuple(branches), where)
