"""`vico shards`: make, index, inspect."""

import re

import pytest

from megatron_vico.cli.shards import main
from megatron_vico.data.encode.tokenizer import train_sentencepiece
from megatron_vico.errors import ConfigError
from tests.toy_data import write_conversations


def test_make_index_and_inspect(tmp_path, capsys):
    data = write_conversations(tmp_path / "data", num_samples=8)
    tokenizer = str(
        train_sentencepiece(["Answer in few words."], model_prefix=tmp_path / "tok", vocab_size=300)
    )
    data.write_text(data.read_text() + "{broken\n")
    flags = ["--tokenizer-model", tokenizer, "--model-size", "toy", "--max-dynamic-patch", "4"]
    out = tmp_path / "shards"
    main(["make", "--jsonl", str(data), "--out", str(out), "--max-skipped", "1", *flags])
    made = capsys.readouterr().out
    assert "conversations.jsonl:9: sample 'conversations-00000009': broken JSON" in made
    assert "8 samples in 1 shards, 1 left out" in made
    assert re.search(r"broken line +1\n", made)
    assert f"{(out / 'shard-000000.tar').stat().st_size} bytes, " in made
    main(
        [
            "index",
            str(out),
            "--no-use-thumbnail",
            "--tile-tags",
            "numbered",
            "--workers",
            "1",
            *flags,
        ]
    )
    assert "8 samples in 1 shards, 1 left out" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="use_thumbnail was False, now True; tile_tags was 'numbered', now 'none'"
    ):
        main(["make", "--jsonl", str(data), "--out", str(out), "--max-skipped", "1", *flags])
    main(["inspect", str(out), "--samples", "2"])
    shown = capsys.readouterr().out
    assert "use_thumbnail=False, tile_tags='numbered'" in shown
    assert "conversations-00000002" in shown
    assert "conversations-00000003" not in shown
    assert "  human: <image>\n  What colour?" in shown


def test_an_unknown_model_size_is_named(tmp_path):
    tokenizer = str(train_sentencepiece(["a"], model_prefix=tmp_path / "tok", vocab_size=300))
    with pytest.raises(ConfigError, match=r"toi.*toy"):
        main(["index", str(tmp_path), "--tokenizer-model", tokenizer, "--model-size", "toi"])
