"""A small byte-level BPE tokenizer of Qwen's kind, trained on the spot on a few thousand captions.

The same size gives the same bytes: the captions are a fixed list, and BPE training breaks its ties
in a fixed order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from zimage_core.chat_template import TEMPLATE

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
PAD_TOKEN, END_TOKEN = "<|endoftext|>", "<|im_end|>"

# Words are cut as Qwen's tokenizers cut them: contractions, letters with what precedes them,
# digits one by one, runs of signs, line ends, spaces.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The same, but for "49-year-old" and "t-shirt" in one piece: captions full of them stay short.
HYPHENATED_WORD = (
    r"[^\r\n\p{L}\p{N}]?(?:\p{N}{1,3}-)?\p{L}+(?:-\p{L}+)*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_COLOURS = (
    "red orange yellow green teal blue navy purple pink brown black white gray blond golden silver "
    "cream turquoise crimson auburn"
)
_SUBJECTS = (
    "person man woman donut cupcake icecream apple pizza burger sushi egg controller shield potion "
    "gem sword coin heart slime castle dragon knight wizard robot cat dog flower tree mountain "
    "teacher engineer doctor pilot chef artist gardener explorer astronaut"
)
_DETAILS = (
    "short hair,long hair,curly hair,spiky hair,bun,bald head,mohawk,bob,round glasses,"
    "square glasses,sunglasses,no glasses,cap,beanie,crown,headphones,top hat,no hat,smiling mouth,"
    "neutral face,sad face,surprised face,laughing mouth,beard,mustache,shirt,eyes,light skin,"
    "tan skin,dark skin,eyelashes,plate,sprinkles,cherry,steam,glow,sparkles"
)
_STYLES = (
    "high quality,flat style,cartoon,soft light,studio portrait,game item icon,pixel art,"
    "clean lines,detailed illustration,photo,watercolor,simple shapes"
)
_FORMS = (
    "portrait avatar of a {subject} with {colour} {detail}, {other} background",
    "{subject} avatar, {detail} in {colour}, {other} shirt, {style}",
    "a {colour} {subject} on a {other} plate, {style}",
    "{style} of the {colour} {subject} with {detail} against a {other} background",
    "an icon of a {colour} {subject} and a {other} {detail}.",
    "user\na {subject}\nassistant\n",
)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`.

    Args:
        folder: made if it does not exist.
        tokenizer: as `train_tokenizer` gives it.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "model_max_length": 131072,
        "pad_token": PAD_TOKEN,
        "padding_side": "right",
        # The plain class, which transformers 4 and 5 both know and take tokenizer.json for.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return folder


def train_tokenizer(
    vocab_size: int,
    texts: Iterable[str] | None = None,
    *,
    word: str = _WORD,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens.

    Args:
        vocab_size: most tokens to learn, special ones included; at least 261.
        texts: what to learn from; the captions of this module if not given.
        word: pattern of the pieces that texts are cut into, and that no token reaches beyond.
        special_tokens: have the first ids.

    Raises:
        ValueError: `vocab_size` does not hold all bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; must be {smallest} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(3000) if texts is None else texts, trainer)
    return tokenizer


def captions(count: int) -> list[str]:
    """Compose `count` captions in which every word of the lists comes up about equally often."""
    # Cycles of lengths that share few factors go through the combinations without repeating soon.
    colours, subjects = cycle(_COLOURS.split()), cycle(_SUBJECTS.split())
    others = cycle([*reversed(_COLOURS.split()), "plain"])
    details, styles = cycle(_DETAILS.split(",")), cycle([*_STYLES.split(","), "drawing"])
    lines = (
        form.format(
            subject=next(subjects),
            colour=next(colours),
            other=next(others),
            detail=next(details),
            style=next(styles),
        )
        for form in cycle(_FORMS)
    )
    return list(islice(lines, count))
