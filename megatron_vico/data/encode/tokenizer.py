"""Text to ids and back: a Hugging Face tokenizer folder, or a SentencePiece model of the toys.

The latter becomes a fast tokenizer when it is loaded. A tokenizer gives plain ids (nothing is
added), knows the chat template's special strings, pickles (for loader workers), and `save_to`
writes files that transformers loads with the same ids.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.models import BPE

from megatron_vico.config.registry import ModelConfig
from megatron_vico.errors import ConfigError
from megatron_vico.files import copy_without_code, open_plain, read_plain

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_END = "</img>"
SPECIAL_STRINGS = (PAD, TURN_START, TURN_END, IMAGE_START, IMAGE_CONTEXT, IMAGE_END)

MAX_CACHED_STRINGS = 1024
MAX_SENTENCEPIECE_VOCAB = 4096
_PLAIN_SYMBOLS = ("\n", *(f"<tile_{i}>" for i in range(1, 14)))
"""Single tokens of our own SentencePiece models besides the special strings; other tokenizers spell
the tile tags out."""

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
HF_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
_PROBES = (
    "Hello world, 1234.\n",
    "  caf\u00e9 \u4f60\u597d\t\U0001f600",
    f"{TURN_START}user\n{IMAGE_CONTEXT}{TURN_END}\n",
)


class Tokenizer:
    """A fast tokenizer, run by the `tokenizers` package."""

    def __init__(self, backend: tokenizers.Tokenizer, *, source: str | Path) -> None:
        """Args: source: the folder or .model file that it was loaded from."""
        self.source = str(source)
        self._backend = backend
        self._fixed: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it become their ids, and nothing is added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_literal(self, text: str) -> list[int]:
        """Ids of `text` in which special strings are text like any other."""
        return list(self._literal.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def encode_fixed(self, text: str) -> tuple[int, ...]:
        """Ids of a string that comes again and again (a prefix, a system turn), from a cache."""
        ids = self._fixed.get(text)
        if ids is None:
            ids = tuple(self.encode(text))
            if len(self._fixed) < MAX_CACHED_STRINGS:
                self._fixed[text] = ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`, with or without the special strings."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def tokens(self) -> list[str]:
        """The token of every id, in order of id; an id that is not in use has an empty string."""
        ids = self._backend.get_vocab(with_added_tokens=True)
        tokens = [""] * (max(ids.values()) + 1)
        for token, token_id in ids.items():
            tokens[token_id] = token
        return tokens

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id; a model's vocabulary may be larger (151,678 of 151,936)."""
        return len(self.tokens())

    def token_id(self, token: str) -> int:
        """The id of a special string; ConfigError if it is not a single token of this tokenizer."""
        ids = self.encode_fixed(token)
        if len(ids) != 1:
            raise ConfigError(
                f"--tokenizer-model {self.source}: {token!r} becomes {len(ids)} tokens, expected 1;"
                " use an InternVL3.5 tokenizer, or make one with tools/build_tokenizer.py."
            )
        return ids[0]

    @property
    def image_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`: 151671 for InternVL3.5, 5 for our SentencePiece models."""
        return self.token_id(IMAGE_CONTEXT)

    @property
    def eos_id(self) -> int:
        """Id of `<|im_end|>`, with which an answer ends."""
        return self.token_id(TURN_END)

    @property
    def pad_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.token_id(PAD)

    def check_fits(self, model: ModelConfig) -> None:
        """ConfigError if a model has no row for the highest id, or another image token."""
        num_rows = model.language.vocab_size
        if self.image_token_id != model.image_token_id:
            raise ConfigError(
                f"--tokenizer-model {self.source}: <IMG_CONTEXT> is {self.image_token_id}, but"
                f" {model.name} expects {model.image_token_id}; use the tokenizer that belongs to"
                " the model."
            )
        if self.vocab_size > num_rows:
            raise ConfigError(
                f"--tokenizer-model {self.source}: highest id {self.vocab_size - 1}, but the"
                f" vocabulary of {model.name} has {num_rows} rows; use the model's own tokenizer."
            )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and how they are applied; the same after `save_to` and loading."""
        digest = hashlib.sha256()
        for token in self.tokens():
            digest.update(token.encode() + b"\0")
        digest.update(json.dumps([self.encode(text) for text in _PROBES]).encode())
        return digest.hexdigest()[:16]

    def save_to(self, folder: str | Path) -> None:
        """Write a folder that transformers' AutoTokenizer loads with the same ids."""
        source, target = Path(self.source), Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            shutil.copyfile(source, target / "sentencepiece.model")
        for path in (source / name for name in HF_FILES):
            if path.exists() and path.resolve() != (target / path.name).resolve():
                copy_without_code(path, target / path.name)
        if source.is_file() or not (target / "tokenizer.json").exists():
            self._backend.save(str(target / "tokenizer.json"))
        if source.is_file() or not (target / "tokenizer_config.json").exists():
            _write_tokenizer_config(target)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A Hugging Face tokenizer folder or a .model file of `train_sentencepiece`.

    ConfigError if there is nothing to load, or a special string is not a single token.
    """
    found = Path(path)
    if found.is_dir():
        backend = _load_folder(found)
    elif found.suffix == ".model" and found.is_file():
        try:
            backend = fast_tokenizer(read_plain(found))
        except Exception as error:  # of sentencepiece, whatever it meets
            raise ConfigError(
                f"--tokenizer-model {found}: no SentencePiece model: {error}."
            ) from error
    else:
        raise ConfigError(
            f"--tokenizer-model {found}: found neither a folder nor a SentencePiece .model file; "
            "give a Hugging Face tokenizer folder, or make one with tools/build_tokenizer.py."
        )
    # A tokenizer.json can carry the settings of its last call; transformers, too, begins without.
    backend.no_truncation()
    backend.no_padding()
    loaded = Tokenizer(backend, source=found)
    for text in SPECIAL_STRINGS:
        loaded.token_id(text)
    return loaded


def _load_folder(folder: Path) -> tokenizers.Tokenizer:
    if not any((folder / name).exists() for name in HF_FILES[:-1]):
        raise ConfigError(
            f"--tokenizer-model {folder}: no tokenizer in this folder (no tokenizer.json); give"
            " --tokenizer-model the folder, or the .model file, of the one it was trained with."
        )
    try:
        for name in filter(lambda name: (folder / name).exists(), HF_FILES):
            open_plain(folder / name).close()
        if (folder / "tokenizer.json").is_file():
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer  # slow to import, needed for old files only

            backend = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ).backend_tokenizer
    # `tokenizers` raises bare Exceptions; transformers meets anything in a stranger's files.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"--tokenizer-model {folder}: needs code of its own, which is never run; save it as"
                " tokenizer.json with transformers, if you trust it, and give that folder."
            ) from error
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"--tokenizer-model {folder}: tokenizer.json cannot be read, or made of the other files"
            f" ({cause}); copy the folder again. A Git LFS pointer becomes its file by `git lfs"
            " pull`; a newer form needs a newer `tokenizers`."
        ) from error
    # Settings of the program that saved it: texts would be cut, filled up or split at random.
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None
    return backend


def train_sentencepiece(
    texts: Iterable[str], *, model_prefix: str | Path, vocab_size: int = 512
) -> Path:
    """Train a small SentencePiece model on `texts` and write `<model_prefix>.model`.

    Ids are always: 0 `<|endoftext|>` (padding), 1 unknown, 2 `<|im_start|>`, 3 `<|im_end|>`, 4
    `<img>`, 5 `<IMG_CONTEXT>`, 6 `</img>`, 7 newline, 8 to 20 `<tile_1>` to `<tile_13>`, then 256
    bytes, then pieces. Text is kept exactly (no normalisation, no dummy prefix), digits are single
    tokens, and a character that `texts` does not have is spelled in bytes.

    Args:
        texts: sentences to learn pieces from; short ones, without special strings.
        vocab_size: most entries, 278 to 4096; fewer where the texts do not give as many pieces.
    """
    symbols = (*SPECIAL_STRINGS, *_PLAIN_SYMBOLS)
    fewest = len(symbols) + 1 + 256
    if not fewest < vocab_size <= MAX_SENTENCEPIECE_VOCAB:
        raise ConfigError(
            f"vocab_size {vocab_size} is not in [{fewest + 1}, {MAX_SENTENCEPIECE_VOCAB}]."
        )
    path = Path(f"{model_prefix}.model")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    lines = [line for text in texts for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=vocab_size,
        model_type="bpe",  # which converts exactly to a fast tokenizer
        pad_id=0,
        pad_piece=PAD,
        unk_id=1,
        bos_id=2,
        bos_piece=TURN_START,
        eos_id=3,
        eos_piece=TURN_END,
        user_defined_symbols=list(symbols),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        max_sentence_length=1 << 16,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return path


def fast_tokenizer(model_proto: bytes) -> tokenizers.Tokenizer:
    """A model of `train_sentencepiece` in the `tokenizers` package.

    Exact because the model is BPE without normalisation or dummy prefix: SentencePiece joins
    whichever neighbours form the best-ranked piece, so each way to split a piece into two pieces is
    a merge of its rank.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    symbols = {*SPECIAL_STRINGS, *_PLAIN_SYMBOLS}
    ids = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    learned = {
        piece: i
        for piece, i in ids.items()
        if not (sp.is_unknown(i) or sp.is_control(i) or sp.is_byte(i) or piece in symbols)
    }
    merges = []
    for piece in sorted(learned, key=lambda piece: (-sp.get_score(ids[piece]), ids[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in splits if left in learned and right in learned]
    fast = tokenizers.Tokenizer(
        BPE(
            vocab=ids,
            merges=merges,
            byte_fallback=True,
            unk_token=sp.id_to_piece(sp.unk_id()),
            fuse_unk=False,
        )
    )
    fast.normalizer = normalizers.Replace(" ", _SPACE)
    fast.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in SPECIAL_STRINGS]
    )
    fast.add_tokens([AddedToken(text, normalized=False, special=False) for text in _PLAIN_SYMBOLS])
    return fast


def _write_tokenizer_config(folder: Path) -> None:
    """Write what transformers needs beside `tokenizer.json`.

    No unknown token is named: transformers would then turn the text "<unk>" into it, which
    SentencePiece does not.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 40960,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
