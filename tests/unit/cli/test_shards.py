"""`vico shards`: what make, index, inspect and verify print and draw, and their exit status."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from megatron_vico.cli.main import main
from megatron_vico.data.encode.tokenizer import train_sentencepiece
from tests.folder_state import state_of
from tests.toy_data import write_conversations
from tests.unit.shard_tools.broken_samples import BROKEN, make_media, row


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with shards a and b, mixture.json and a tokenizer."""
    root = tmp_path_factory.mktemp("made")
    text = ["Answer in few words. red"]
    train_sentencepiece(text, model_prefix=root / "tok", vocab_size=300)
    for name, count in (("a", 8), ("b", 4)):
        jsonl = write_conversations(root / f"data_{name}", num_samples=count)
        jsonl = jsonl.rename(jsonl.with_name(f"{name}.jsonl"))
        flags = ("--samples-per-shard", "4", *encoding(root))
        assert main(words("make", "--jsonl", jsonl, "--out", root / name, *flags)) == 0
    mixture = {"version": 1, "folders": [{"path": "a", "repeat": 0.5}, {"path": "b", "repeat": 3}]}
    (root / "mixture.json").write_text(json.dumps(mixture))
    return root


@pytest.fixture
def run(capsys):
    """run(*words): exit status of `vico shards`, and what it printed."""

    def call(*given):
        status = main(words(*given))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def words(*given):
    return ["shards", *map(str, given)]


def encoding(root):
    return f"--tokenizer-model {root}/tok.model --model-size toy --max-dynamic-patch 4".split()


def test_make_index_and_inspect(made, tmp_path, run):
    data, out, flags = write_conversations(tmp_path, num_samples=8), tmp_path / "o", encoding(made)
    data.write_text(data.read_text() + "{broken\n")
    make = ("make", "--jsonl", data, "--out", out, "--max-skipped", 1, *flags)
    status, shown = run(*make)
    assert status == 0
    assert "conversations.jsonl:9: sample 'conversations-00000009': broken JSON" in shown
    assert "8 samples in 1 shards, 1 left out" in shown
    assert re.search(r"broken line +1\n", shown)
    assert f"{(out / 'shard-000000.tar').stat().st_size} bytes, " in shown
    tiling = ("--no-use-thumbnail", "--tile-tags", "numbered")
    _, shown = run("index", out, *tiling, "--workers", 1, *flags)
    assert "8 samples in 1 shards, 1 left out" in shown
    status, shown = run(*make)
    assert status == 2
    assert "use_thumbnail was False, now True; tile_tags was 'numbered', now 'none'" in shown
    _, shown = run("inspect", out, "--samples", 2)
    assert "use_thumbnail=False, tile_tags='numbered'" in shown
    assert "conversations-00000002" in shown
    assert "conversations-00000003" not in shown
    assert "  human: <image>\n  What colour?" in shown


def test_every_kind_of_broken_sample_ends_it_or_is_left_out_by_name(made, tmp_path, run):
    place, out = tmp_path / "in", tmp_path / "out"
    place.mkdir()
    make_media(place)
    limit = row("<image>", image="huge.png"), "broken image", "pixels"
    Image.new("1", (14_000, 14_000)).save(place / "huge.png")
    broken, data = [*BROKEN, limit], place / "a\x1b[2J.jsonl"
    data.write_bytes(b"\n".join([row("What?"), *(line for line, _, _ in broken)]) + b"\n")
    before = state_of(place)
    make = ("make", "--jsonl", data, "--out", out, "--workers", 1, *encoding(made))
    status, shown = run(*make)
    assert status == 2
    assert "replace the file or remove the sample" in shown.splitlines()[-1]
    assert not out.exists()
    status, shown = run(*make, "--max-skipped", len(broken))
    assert status == 0
    assert f"1 samples in 1 shards, {len(broken)} left out" in shown
    assert "\x1b" not in shown
    listed = json.loads((out / "index.json").read_text())["skipped"]
    for number, (_, cause, words) in enumerate(broken, start=2):
        assert re.search(rf"{cause}.*jsonl:{number}: .*{words}", json.dumps(listed)), words
    assert state_of(place) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("index {} --tokenizer-model {}/tok.model --model-size toi", "'toi'; did you mean 'toy'"),
        ("inspect {}/mixture.json --start 12", "--start 12: expected a number from 0 to 11"),
        ("inspect {}/mixture.json --key c", "--key c: no such sample in"),
        ("inspect {}/a --samples 0 --picture {}/none.png", "--picture: no samples to draw"),
        ("verify file://{}/b", "only local folders are verified"),
        ("verify {}/b --workers -1", "--workers -1: expected at least 0"),
        ("verify {}", "did you mean {}/mixture.json"),
    ],
)
def test_what_cannot_be_done_is_an_error(made, run, given, message):
    status, shown = run(*given.replace("{}", str(made)).split())
    assert status == 2
    assert message.replace("{}", str(made)) in shown


def test_inspect_shows_draws_and_counts(made, tmp_path, run):
    picture, plots, numbers = tmp_path / "sheet.png", tmp_path / "plots", tmp_path / "numbers.json"
    files = ("--picture", picture, "--plots", plots, "--json", numbers)
    status, shown = run("inspect", made / "a", "--samples", 3, "--seq-length", 256, *files)
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


def test_inspect_starts_where_it_is_told_over_a_mixture(made, run):
    by_number = run("inspect", made / "mixture.json", "--start", 9)
    by_key = run("inspect", made / "mixture.json", "--key", "b-00000002")
    assert by_number == by_key
    assert "9: b-00000002" in by_key[1]
    assert "10: b-" not in by_key[1]
    assert "repeat 0.5" in by_key[1]
    assert "of 16 samples" in by_key[1]  # 8 / 2 + 3 * 4 are packed


def test_inspect_decodes_tokens_and_refuses_another_tokenizer(made, tmp_path, run):
    _, shown = run("inspect", made / "b", "--tokenizer-model", made / "tok.model")
    assert "<|im_start|>assistant\n  [+" in shown
    other = train_sentencepiece(["another"], model_prefix=tmp_path / "tok", vocab_size=290)
    status, shown = run("inspect", made / "b", "--tokenizer-model", other)
    assert status == 2
    assert "indexed with tokenizer" in shown


def test_packs_are_counted_where_the_tokens_of_a_tile_are_known(made, tmp_path, run):
    folder = shutil.copytree(made / "b", tmp_path / "b")
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"image_size": 32', '"image_size": 33'))
    assert "give --model-size" in run("inspect", folder)[1]
    assert "packs of at most" not in run("inspect", folder)[1]
    assert "packs of at most" in run("inspect", folder, "--model-size", "toy")[1]
    assert "packs of at most" in run("inspect", f"file://{made}/b")[1]


def test_verify_says_what_is_wrong_by_its_status(made, tmp_path, run):
    flags = ("--tokenizer-model", made / "tok.model", "--workers", 0)
    status, shown = run("verify", made / "mixture.json", *flags)
    assert status == 0
    assert "2 folders, 3 shards" in shown
    assert "12 samples decoded: 0 problems" in shown
    root = shutil.copytree(made, tmp_path / "copy")
    (root / "a" / "shard-000001.tar").unlink()
    tar = root / "b" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    status, shown = run("verify", root / "mixture.json", *flags, "--seq-length", 50)
    assert status == 1
    missing = f"{root}/a/shard-000001.tar: 4 samples, a-00000005 .. a-00000008: missing file: "
    assert missing in shown
    assert f"{tar}: wrong size: " in shown
    table = shown.split("\n\ncause")[1]
    rows = {line[:20].strip(): line[20:].split() for line in table.splitlines()[1:]}
    assert rows["missing file"] == ["1", "4", "1"]
    assert rows["wrong size"] == ["1", "0", "1"]
    assert int(rows["too large for a pack"][0]) > 2
    status, shown = run("verify", made / "none")
    assert status == 1
    assert "no index.json there" in shown
