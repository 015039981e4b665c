"""The exact SAIL-VL2 tokenizer, small ones of its kind, and the chat template."""

import hashlib
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from sail_model import load_tokenizer, train_tokenizer
from sail_model.chat import SYSTEM_MESSAGE
from sail_model.tokenizer import ADDED_TOKENS, find_tiktoken_file, read_tiktoken, split_entry

MIXED = [
    "What shape is in the image?",
    "你好，世界！这是一个多模态模型。",
    "def f(x):\n    return x**2  # square\n\n\t\tdone",
    "1234567890 3.14159 -17 €99.95",
    "naïve café Übergröße — “quoted” … 🤖🎉 مرحبا",
    "  leading, trailing and   inner spaces  \r\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    try:
        find_tiktoken_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return load_tokenizer()


def test_vocabulary_file() -> None:
    try:
        path = find_tiktoken_file()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def test_released_ids(tokenizer: Qwen2Tokenizer) -> None:
    ids = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<think>": 151667,
        "</think>": 151668,
        "<img>": 151669,
        "</img>": 151670,
        "<IMG_CONTEXT>": 151671,
        "<quad>": 151672,
        "</box>": 151677,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert [tokenizer.convert_tokens_to_ids(token) for token in ADDED_TOKENS] == list(range(151643, 151678))
    assert len(tokenizer) == 151678
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (151643, 151645, None)
    # no file of merges is read, so these known ids show that the recovered merges are Qwen's
    assert tokenizer("hello world").input_ids == [14990, 1879]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids == [151644, 872, 198, 6023, 151645]


@pytest.mark.parametrize("text", MIXED)
def test_encoding_follows_the_ranks(text: str, tokenizer: Qwen2Tokenizer) -> None:
    """Against byte-pair encoding by rank, straight from the file, on every piece that the pre-tokenizer cuts."""
    ranks = read_tiktoken(find_tiktoken_file())
    backend = tokenizer.backend_tokenizer
    pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    normal = backend.normalizer.normalize_str(text)
    wanted = []
    for _, (start, end) in pieces:
        parts = [bytes([byte]) for byte in normal[start:end].encode()]
        while len(parts) > 1:
            pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
            best = min(pairs)
            if best == len(ranks):
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        wanted += [ranks[part] for part in parts]
    assert tokenizer(text).input_ids == wanted
    assert tokenizer.decode(wanted) == normal


def test_special_tokens_are_left_out_of_decoded_text(tokenizer: Qwen2Tokenizer) -> None:
    ids = tokenizer("<think>a</think>b<box>c</box><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>bc"


def test_tokenizer_round_trip(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, Qwen2Tokenizer)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    for text in [*MIXED, "<img><IMG_CONTEXT></img><think>"]:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_bad_vocabulary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.tiktoken"
    short.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="has 2 entries"):
        load_tokenizer(short)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(tmp_path / "missing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="dashscope"):
        load_tokenizer()


def test_split_entry() -> None:
    ranks = {bytes([b]): i for i, b in enumerate(b"abc")} | {b"ab": 3, b"bc": 4, b"abc": 5}
    assert split_entry(b"abc", ranks) == (b"ab", b"c")
    with pytest.raises(ValueError, match="not reachable"):
        split_entry(b"cab", {b"a": 0, b"b": 1, b"c": 2, b"cab": 3})


# ---- small tokenizers -----------------------------------------------------------------------------------------------
QUESTIONS = ["what shape is in the image?", "is there a red circle?", "does the image contain a triangle?"] * 3


def test_trained_tokenizer_encodes_anything() -> None:
    small = train_tokenizer(QUESTIONS, 340)
    assert 291 < len(small) <= 340
    for text in [*QUESTIONS, *MIXED]:
        assert small.decode(small(text).input_ids) == small.backend_tokenizer.normalizer.normalize_str(text)
    assert len(small("is there a red circle?").input_ids) < len("is there a red circle?")
    added = [small.convert_tokens_to_ids(token) for token in ADDED_TOKENS]
    assert added == list(range(len(small) - 35, len(small)))
    assert small("<IMG_CONTEXT>").input_ids == [small.convert_tokens_to_ids("<IMG_CONTEXT>")]
    assert (small.pad_token, small.eos_token) == ("<|endoftext|>", "<|im_end|>")


def test_trained_tokenizer_is_deterministic_and_bounded() -> None:
    assert train_tokenizer(QUESTIONS, 320).get_vocab() == train_tokenizer(iter(QUESTIONS), 320).get_vocab()
    assert len(train_tokenizer(QUESTIONS, 291)) == 291
    with pytest.raises(ValueError, match="vocab_size=290"):
        train_tokenizer(QUESTIONS, 290)


# ---- chat template --------------------------------------------------------------------------------------------------
def render(messages: list, **kwargs: bool) -> str:
    return train_tokenizer(QUESTIONS, 291).apply_chat_template(messages, tokenize=False, **kwargs)


PICTURE_AND_QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}


def test_prompt_is_the_released_one() -> None:
    assert render([PICTURE_AND_QUESTION], add_generation_prompt=True) == (
        "<|im_start|>system\n"
        "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。<|im_end|>"
        "<|im_start|>user\n<image>\nQUESTION<|im_end|><|im_start|>assistant\n"
    )


def test_prompt_of_several_turns_and_pictures() -> None:
    two = {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Q"}]}
    turns = [PICTURE_AND_QUESTION, {"role": "assistant", "content": "A"}, two]
    assert render(turns) == (
        f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|><|im_start|>user\n<image>\nQUESTION<|im_end|>"
        "<|im_start|>assistant\nA<|im_end|><|im_start|>user\n<image>\n<image>\nQ<|im_end|>"
    )


def test_system_messages() -> None:
    question = {"role": "user", "content": "Q"}
    own = render([{"role": "system", "content": "Be brief."}, question])
    assert own == "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ<|im_end|>"
    assert render([{"role": "system", "content": ""}, question]) == "<|im_start|>user\nQ<|im_end|>"


THINK = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)


def test_thinking_ends_every_user_turn_with_the_released_request() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        PICTURE_AND_QUESTION,
        {"role": "assistant", "content": "<think>T</think>\\boxed{A}"},
        {"role": "user", "content": "Q"},
    ]
    first = render(turns[:2], add_generation_prompt=True, thinking=True)
    assert first == (
        "<|im_start|>system\nBe brief.<|im_end|>"
        f"<|im_start|>user\n<image>\nQUESTION{THINK}<|im_end|><|im_start|>assistant\n"
    )
    whole = render(turns, add_generation_prompt=True, thinking=True)
    assert whole == (
        f"{first}<think>T</think>\\boxed{{A}}<|im_end|><|im_start|>user\nQ{THINK}<|im_end|><|im_start|>assistant\n"
    )
    assert render(turns, thinking=False) == render(turns) and THINK not in render(turns)


def test_what_the_template_refuses() -> None:
    with pytest.raises(jinja2.TemplateError, match="not 'video'"):
        render([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(jinja2.TemplateError, match="not 'tool'"):
        render([{"role": "tool", "content": "x"}])


def test_answer_mask() -> None:
    """What a model learns to write: the answers and the ends of their turns."""
    small = train_tokenizer(QUESTIONS, 291)
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}] * 2
    out = small.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    learned = [token for token, keep in zip(out["input_ids"], out["assistant_masks"], strict=True) if keep]
    assert small.decode(learned) == "yes<|im_end|>yes<|im_end|>"
