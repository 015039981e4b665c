"""SAIL-VL2's tokenizer, exactly, from the vocabulary file of `dashscope`; and small ones of the same kind.

Qwen's byte-level BPE, 151,643 entries, then the 35 added tokens of Qwen3 and SAIL-VL2 (ids 151643 to 151677).
The file lists entries by merge rank; merges are recovered by splitting each entry with the ranks below its own.
"""

import base64
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from .chat import CHAT_TEMPLATE

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
PAD, TURN_END = "<|endoftext|>", "<|im_end|>"
QWEN_ENTRIES = 151643

# In the order of their ids; all but the plain ones are special: `skip_special_tokens` leaves them out of the text.
_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
    " <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
_PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
    " <tool_response> </tool_response> <think> </think>"
)
_SAIL = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>"
ADDED_TOKENS: dict[str, bool] = {
    token: group is not _PLAIN for group in (_SPECIAL, _PLAIN, _SAIL) for token in group.split()
}


def load_tokenizer(tiktoken_file: str | Path | None = None) -> Qwen2Tokenizer:
    """The exact tokenizer of SAIL-VL2, with the corrected chat template.

    `tiktoken_file` is a `qwen.tiktoken`; by default the one in the installed `dashscope` package (which is not
    imported). Raises FileNotFoundError where there is none, ValueError where it is not Qwen's. Takes some seconds:
    keep the result with `save_pretrained`.
    """
    path = find_tiktoken_file() if tiktoken_file is None else Path(tiktoken_file)
    ranks = read_tiktoken(path)
    if len(ranks) != QWEN_ENTRIES:
        raise ValueError(f"load_tokenizer: {path} has {len(ranks)} entries, Qwen's file has {QWEN_ENTRIES}")
    letters = bytes_to_unicode()

    def text(entry: bytes) -> str:
        return "".join(letters[byte] for byte in entry)

    vocab = {text(entry): rank for entry, rank in ranks.items()}
    halves = (split_entry(entry, ranks) for entry in ranks if len(entry) > 1)
    merges = [(text(left), text(right)) for left, right in halves]
    return _assemble(vocab, merges)


def find_tiktoken_file() -> Path:
    """Where the installed `dashscope` package keeps `qwen.tiktoken`."""
    spec = importlib.util.find_spec("dashscope")
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "load_tokenizer: found no qwen.tiktoken. It comes with dashscope (pip install --no-deps dashscope==2.0.2);"
        " or pass the path of a copy"
    )


def read_tiktoken(path: str | Path) -> dict[bytes, int]:
    """Entries and their ranks, in rank order. Each line of the file is a base64 entry and its rank."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    pairs = (line.split() for line in lines if line)
    ranks = {base64.b64decode(entry): int(rank) for entry, rank in pairs}
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def split_entry(entry: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two entries whose merge makes `entry`: byte-pair merges of lower rank, applied until two parts remain."""
    parts = [entry[i : i + 1] for i in range(len(entry))]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False)]
        best = min(candidates)
        if best >= ranks[entry]:
            raise ValueError(f"split_entry: {entry!r} is not reachable by merges of lower rank")
        i = candidates.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE of the same kind, trained on `texts`, for small models; any text can be encoded.

    `vocab_size` counts everything: 256 bytes, 35 added tokens (which keep their names, not their ids) and the merges;
    texts that hold fewer merges give a smaller vocabulary. Deterministic. Raises ValueError below 291.
    """
    smallest = 256 + len(ADDED_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"train_tokenizer: vocab_size={vocab_size} is less than bytes and added tokens, {smallest}")
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    return _assemble(model["vocab"], [(left, right) for left, right in model["merges"]])


def with_added_tokens(tokenizer: Qwen2Tokenizer) -> Qwen2Tokenizer:
    """A Qwen tokenizer made SAIL-VL2's: the added tokens that it lacks come behind its own, then chat and padding.

    A Qwen3 tokenizer gets ids 151669 to 151677, which are SAIL-VL2's.
    """
    lacking = [token for token in ADDED_TOKENS if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=ADDED_TOKENS[token], normalized=False) for token in lacking])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side = TURN_END, PAD, "left"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Qwen2Tokenizer:
    """Vocabulary and merges as a tokenizer with the added tokens behind them."""
    added = {
        len(vocab) + i: AddedToken(token, special=special, normalized=False)
        for i, (token, special) in enumerate(ADDED_TOKENS.items())
    }
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # pairs, as the tokenizers library takes them
        added_tokens_decoder=added,
        unk_token=None,  # type: ignore[arg-type]  # every byte has an entry
        eos_token=TURN_END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
