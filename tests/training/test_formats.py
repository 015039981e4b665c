"""Records of every form become the same conversations; what fits none of them is refused with what is wrong."""

import base64
from pathlib import Path
from typing import Any

import pytest

from training.data.conversation import Conversation, Picture, Text, Turn
from training.data.formats import conversation_of

FOLDER = Path("/data")
SHOWN = Picture(FOLDER / "a.png")
ASKED = (Turn("user", (SHOWN, Text("what?"))), Turn("assistant", (Text("this"),), learn=True))


def read(record: Any, pictures: tuple[bytes, ...] = ()) -> Conversation:
    return conversation_of(record, FOLDER, "here", pictures)


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "this"},
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "file:///data/a.png"}},
                        {"type": "text", "text": "what?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "this"}]},
            ]
        },
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "this"}],
        },
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}],
        },
    ],
    ids=["parts", "openai", "images", "llava"],
)
def test_forms_of_one_conversation(record: dict[str, Any]) -> None:
    assert read(record) == Conversation(ASKED, where="here")


def test_questions_are_branches() -> None:
    found = read({"picture": "a.png", "questions": [["what?", "this"], ["and?", "that"]]})
    assert found.turns == (Turn("user", (SHOWN,)),)
    assert found.branches[1] == (Turn("user", (Text("and?"),)), Turn("assistant", (Text("that"),), learn=True))


def test_text_alone_several_pictures_and_turns() -> None:
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<image> and <image>: which?"},
        {"from": "gpt", "value": "the second"},
        {"from": "human", "value": "and <image>?"},
        {"from": "gpt", "value": "no"},
    ]
    found = read({"images": ["a.png", "b.png", "c.png"], "conversations": turns})
    names = [part.source.name for turn in found.turns for part in turn.parts if isinstance(part, Picture)]
    assert names == ["a.png", "b.png", "c.png"]
    assert [turn.learn for turn in found.turns] == [False, False, True, False, True]
    assert read({"messages": [{"role": "assistant", "content": "once upon a time"}]}).turns[0].learn


def test_a_system_prompt_beside_the_turns() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = read({"system": "be brief", "conversations": turns, "image": None, "images": []})
    assert [turn.role for turn in found.turns] == ["system", "user", "assistant"]
    assert found.turns[0] == Turn("system", (Text("be brief"),))
    assert read({"system": "", "conversations": turns}) == read({"system": None, "conversations": turns})


def test_pictures_beside_a_record_and_in_it() -> None:
    data = base64.b64encode(b"picture").decode()
    broken = "\r\n".join([data[:4], data[4:], ""])  # as MIME breaks lines
    for url in (f"data:image/png;base64,{data}", {"url": f"data:;base64,{data}"}, f"data:;base64,{broken}"):
        part = {"type": "image_url", "image_url": url}
        found = read({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]})
        assert found.turns[0].parts == (Picture(b"picture"),)
    beside = read({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, (b"p",))
    assert beside.turns[0].parts == (Picture(b"p"),)


def test_a_video_is_labeled_frames_of_one_tile() -> None:
    video = {"type": "video", "frames": ["a.png", "b.png"]}
    found = read({"messages": [{"role": "user", "content": [video]}, {"role": "assistant", "content": "x"}]})
    assert found.turns[0].parts == (
        Text("Frame-1: "),
        Picture(FOLDER / "a.png", max_tiles=1),
        Text("Frame-2: "),
        Picture(FOLDER / "b.png", max_tiles=1),
    )


@pytest.mark.parametrize("mark", [{"learn": False}, {"weight": 0}])
def test_a_message_may_say_that_it_is_not_learned(mark: dict[str, Any]) -> None:
    answers = [{"role": "assistant", "content": "a", **mark}, {"role": "assistant", "content": "b"}]
    found = read({"messages": [{"role": "user", "content": "q"}, *answers]})
    assert [turn.learn for turn in found.turns] == [False, False, True]


def dialogue(question: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        (3, "no object"),
        ({}, "got nothing; want"),
        ({"text": "a"}, "got text; want"),
        ({"messages": []}, "at least one message"),
        ({"messages": "a"}, "at least one message"),
        ({"messages": ["a"]}, "is no message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role is 'tool'"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "value is no text"),
        (dialogue(3), "neither text nor a list of parts"),
        (dialogue([{"type": "audio"}]), "a part of type 'audio'"),
        (dialogue([{"type": "video"}]), "video with frames"),
        (dialogue("<image>"), "more <image> than pictures"),
        (dialogue("q", images=["a.png"]), "1 pictures more than <image>"),
        (dialogue("q", "<image>", images=["a.png"]), "a picture in what the assistant says"),
        (dialogue("<img>"), "holds <img>"),
        (dialogue("q", "a<|im_end|>"), r"holds <\|im_end\|>"),
        (dialogue([{"type": "text", "text": "<image>"}]), "holds <image>"),
        (dialogue([{"type": "image", "image": 3}]), "a picture is no path"),
        (dialogue([{"type": "image", "url": "https://a.org/b.png"}]), "want a file"),
        (dialogue([{"type": "image", "base64": "***"}]), "base64"),
        (dialogue("q", images=[""]), "a picture is no path"),
        ({"messages": [{"role": "assistant", "content": "a", "learn": "no"}]}, "learn is 'no'"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "comes first"),
        (dialogue("q", video="a.mp4"), "a video file; want its frames"),
        (dialogue("q", system=3), "3 is no text"),
        (dialogue("a\ud800"), "half a character"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "comes first"),
        ({"questions": [["a", "b"]]}, "0 pictures, want one"),
        ({"picture": "a.png", "questions": []}, "at least one question"),
        ({"picture": "a.png", "questions": "ab"}, "at least one question"),
        ({"picture": "a.png", "questions": [["a"]]}, "is no pair of texts"),
        ({"picture": "a.png", "questions": [["a", 3]]}, "is no pair of texts"),
        ({"picture": "a.png", "questions": [["<image> what?", "b"]]}, "holds <image>"),
    ],
)
def test_what_fits_no_form_is_refused(record: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read(record)
