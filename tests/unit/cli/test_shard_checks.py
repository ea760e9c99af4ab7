"""`vico shards inspect` and `verify`: what they print and draw, and their exit status."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from megatron_vico.cli.main import main
from megatron_vico.data.encode.tokenizer import train_sentencepiece
from tests.toy_data import write_conversations


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with shards a and b, mixture.json and a tokenizer."""
    root = tmp_path_factory.mktemp("made")
    tokenizer = train_sentencepiece(
        ["Answer in few words. red"], model_prefix=root / "tok", vocab_size=300
    )
    for name, count in (("a", 8), ("b", 4)):
        written = write_conversations(root / f"data_{name}", num_samples=count)
        flags = (
            f"--tokenizer-model {tokenizer} --model-size toy --max-dynamic-patch 4"
            " --samples-per-shard 4".split()
        )
        jsonl = written.rename(written.with_name(f"{name}.jsonl"))
        assert (
            main(["shards", "make", "--jsonl", str(jsonl), "--out", str(root / name), *flags]) == 0
        )
    mixture = {"version": 1, "folders": [{"path": "a", "repeat": 0.5}, {"path": "b", "repeat": 3}]}
    (root / "mixture.json").write_text(json.dumps(mixture))
    return root


def run(capsys, *words):
    status = main(["shards", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_inspect_shows_draws_and_counts(made, tmp_path, capsys):
    picture, plots, numbers = tmp_path / "sheet.png", tmp_path / "plots", tmp_path / "numbers.json"
    files = ("--picture", picture, "--plots", plots, "--json", numbers)
    status, shown = run(capsys, "inspect", made / "a", "--samples", 3, "--seq-length", 256, *files)
    assert status == 0
    assert "8 samples in 2 shards, repeat 1" in shown
    assert "2: a-00000003" in shown
    assert "a-00000004" not in shown
    assert "[+" in shown
    content = json.loads(numbers.read_text())
    assert content["num_samples"] == content["packing"]["num_samples"] == 8
    assert content["packing"]["seq_length"] == 256
    for file in (picture, plots / "shards.png"):
        assert str(file) in shown
        assert len(np.unique(np.asarray(Image.open(file).convert("L")))) > 10


def test_inspect_starts_where_it_is_told_over_a_mixture(made, capsys):
    _, by_number = run(capsys, "inspect", made / "mixture.json", "--start", 9)
    _, by_key = run(capsys, "inspect", made / "mixture.json", "--key", "b-00000002")
    assert by_number == by_key
    assert "9: b-00000002" in by_key
    assert "10: b-" not in by_key
    assert "repeat 0.5" in by_key
    assert "of 16 samples" in by_key  # 8 / 2 + 3 * 4 are packed
    for flags, message in (
        (("--start", 12), "--start 12: expected a number from 0 to 11"),
        (("--key", "c"), "--key c: no such sample in"),
        (("--samples", 0, "--picture", made / "none.png"), "--picture: no samples to draw"),
    ):
        status, shown = run(capsys, "inspect", made / "mixture.json", *flags)
        assert status == 2
        assert message in shown


def test_inspect_decodes_tokens_and_refuses_another_tokenizer(made, tmp_path, capsys):
    _, shown = run(capsys, "inspect", made / "b", "--tokenizer-model", made / "tok.model")
    assert "<|im_start|>assistant\n  [+" in shown
    other = train_sentencepiece(["another"], model_prefix=tmp_path / "tok", vocab_size=290)
    status, shown = run(capsys, "inspect", made / "b", "--tokenizer-model", other)
    assert status == 2
    assert "indexed with tokenizer" in shown


def test_inspect_without_packs_where_the_tokens_of_a_tile_are_not_known(made, tmp_path, capsys):
    folder = shutil.copytree(made / "b", tmp_path / "b")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"image_size": 32', '"image_size": 33'))
    _, shown = run(capsys, "inspect", folder)
    assert "give --model-size" in shown
    assert "packs of at most" not in shown
    _, shown = run(capsys, "inspect", folder, "--model-size", "toy")
    assert "packs of at most" in shown


def test_inspect_counts_packs_of_a_url_too(made, capsys):
    status, shown = run(capsys, "inspect", f"file://{made}/b")
    assert status == 0
    assert "packs of at most" in shown


def test_verify_refuses_what_it_cannot_read(made, capsys):
    for words, message in (
        ((f"file://{made}/b",), "only local folders are verified"),
        ((made / "b", "--workers", -1), "--workers -1: expected at least 0"),
        ((made,), f"did you mean {made}/mixture.json"),
    ):
        status, shown = run(capsys, "verify", *words)
        assert status == 2
        assert message in shown


def test_verify_says_what_is_wrong_by_its_status(made, tmp_path, capsys):
    flags = ("--tokenizer-model", made / "tok.model", "--workers", 0)
    status, shown = run(capsys, "verify", made / "mixture.json", *flags)
    assert status == 0
    assert "2 folders, 3 shards" in shown
    assert "12 samples decoded: 0 problems" in shown
    root = shutil.copytree(made, tmp_path / "copy")
    (root / "a" / "shard-000001.tar").unlink()
    tar = root / "b" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    status, shown = run(capsys, "verify", root / "mixture.json", *flags, "--seq-length", 50)
    assert status == 1
    assert (
        f"{root}/a/shard-000001.tar: 4 samples, a-00000005 .. a-00000008: missing file: " in shown
    )
    assert f"{tar}: wrong size: " in shown
    table = shown.split("\n\ncause")[1]
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()[1:]}
    assert rows["missing file"] == ["1", "4", "1"]
    assert rows["wrong size"] == ["1", "0", "1"]
    assert int(rows["too large for a pack"][0]) > 2
    status, shown = run(capsys, "verify", made / "none")
    assert status == 1
    assert "no index.json there" in shown
