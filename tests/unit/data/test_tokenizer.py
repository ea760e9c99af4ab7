"""Fixed ids, exact text, and the same ids from the files that transformers loads."""

import json
import pickle
import random
from dataclasses import replace

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megatron_vico.config.registry import get_model_config
from megatron_vico.data.encode.tokenizer import SPECIAL_STRINGS, load_tokenizer, train_sentencepiece
from megatron_vico.errors import ConfigError

ALPHABET = [
    *"abcdeghilnorstuw AW?.\n\t-012345\r\x01",
    "  ",
    "\u00a0",
    "\u00e9",
    "\u4f60",
    "\U0001f600",
]
LOOKALIKES = [
    *"<unk> <0x41> <s> <tile_1> <tile_11> <tile_99> \u2581 <img".split(),
    *SPECIAL_STRINGS,
]


def random_texts(count, *, seed=0):
    rng = random.Random(seed)
    words = ["What", "colour", "red", "and", "green", "aaaa", "aaa", "------", "words", " "]
    for index in range(count):
        source = (ALPHABET, ALPHABET + LOOKALIKES, words)[index % 3]
        yield "".join(rng.choices(source, k=rng.randint(0, 40)))


def test_ids_of_special_strings_are_fixed(tokenizer, tmp_path):
    expected = "<|endoftext|> <unk> <|im_start|> <|im_end|> <img> <IMG_CONTEXT> </img>".split()
    other = load_tokenizer(
        train_sentencepiece(["something else 99"], model_prefix=tmp_path / "x", vocab_size=300)
    )
    for each in (tokenizer, other):
        assert each.tokens()[:8] == [*expected, "\n"]
        assert each.tokens()[8:21] == [f"<tile_{i}>" for i in range(1, 14)]
        assert (each.image_token_id, each.eos_id, each.pad_id) == (5, 3, 0)
    assert tokenizer.fingerprint != other.fingerprint


def test_digits_are_single_tokens_and_decoding_can_leave_special_ones_out(tokenizer):
    assert len(tokenizer.encode("345")) == 3
    ids = tokenizer.encode("<|im_start|>red\n<IMG_CONTEXT><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red\n"


@pytest.mark.slow
def test_ids_equal_sentencepieces_own_and_those_of_saved_files(tokenizer, tmp_path):
    sentencepiece = SentencePieceProcessor(model_file=tokenizer.source)
    tokenizer.save_to(tmp_path)
    transformers_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    fast = load_tokenizer(tmp_path)
    for index, text in enumerate(random_texts(6000)):
        ids = tokenizer.encode(text)
        assert fast.encode(text) == ids == sentencepiece.encode(text), repr(text)
        assert fast.decode(ids) == tokenizer.decode(ids) == sentencepiece.decode(ids)
        if "\u2581" not in text:  # SentencePiece's own sign for a space
            assert tokenizer.decode(ids) == text
        if index % 20 == 0:
            assert transformers_tokenizer(text).input_ids == ids, repr(text)
            assert transformers_tokenizer.decode(ids) == tokenizer.decode(ids)
    assert fast.fingerprint == tokenizer.fingerprint
    pieces = [sentencepiece.id_to_piece(i) for i in range(sentencepiece.get_piece_size())]
    assert fast.tokens() == tokenizer.tokens() == pieces
    assert (transformers_tokenizer.eos_token_id, transformers_tokenizer.pad_token_id) == (3, 0)


def test_a_saved_folder_saves_again_and_pickles(tokenizer, tmp_path):
    tokenizer.save_to(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save_to(tmp_path / "b")
    for each in (tokenizer, load_tokenizer(tmp_path / "b")):
        assert pickle.loads(pickle.dumps(each)).fingerprint == tokenizer.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "b").eos_token == "<|im_end|>"


def test_missing_path_names_it_and_the_fix(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.*build_tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokenizer_without_image_token_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocab = {letter: i for i, letter in enumerate("<|>/_imgIMGCONTEXTendoftextrat")}
    Tokenizer(BPE(vocab=vocab, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="expected 1"):
        load_tokenizer(tmp_path)


@pytest.fixture
def saved(tokenizer, tmp_path):
    """saved(change): a copy of the tokenizer whose tokenizer.json has been changed."""

    def make(change):
        tokenizer.save_to(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_runtime_settings_of_the_file_have_no_effect(tokenizer, saved):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}

    def change(content):
        content |= {"truncation": truncation, "padding": padding}
        content["model"]["dropout"] = 0.9

    loaded = load_tokenizer(saved(change))
    text = "Answer in few words. What colour? red and green"
    assert {tuple(loaded.encode(text)) for _ in range(9)} == {tuple(tokenizer.encode(text))}
    assert len(tokenizer.encode(text)) > 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "version https://git-lfs"}, r"cannot be read.*git lfs pull"),
        ({"tokenizer.json": "[]"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": "["}, "cannot be read"),
        ({"tokenizer_config.json": '"x"'}, "cannot be read"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "tokenizer_class": "Own",
                        "auto_map": {"AutoTokenizer": ["tokenizer.A", None]},
                    }
                ),
                "tokenizer.py": "open('ran', 'w')\nclass A: pass",
            },
            "needs code of its own, which is never run; save it as tokenizer.json",
        ),
    ],
)
def test_unreadable_files_and_code_are_refused(files, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_id_beyond_the_models_rows_is_named(tokenizer):
    model = get_model_config("toy")
    tokenizer.check_fits(model)
    few = replace(model, language=replace(model.language, vocab_size=9))
    with pytest.raises(ConfigError, match=r"highest id \d+, but the vocabulary of toy has 9 rows"):
        tokenizer.check_fits(few)
    with pytest.raises(ConfigError, match="<IMG_CONTEXT> is 5, but toy expects 6; use"):
        tokenizer.check_fits(replace(model, image_token_id=6))


@pytest.mark.parametrize("vocab_size", [100, 4097])
def test_vocabulary_sizes_out_of_range(vocab_size, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size"):
        train_sentencepiece(["a"], model_prefix=tmp_path / "x", vocab_size=vocab_size)
