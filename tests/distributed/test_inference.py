"""An engine over two tensor-parallel ranks says what one rank says."""

from pathlib import Path

from tests.distributed.engine_ranks import found_answers
from tests.distributed.launch import on_ranks


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    ranks = on_ranks(found_answers, str(tmp_path), num_ranks=2)
    for size in ("toy", "toy-moe"):
        served = ranks[0].pop(f"{size} served")
        assert ranks[1].pop(f"{size} served") == []  # it only follows
        assert served == ranks[0][f"{size} greedy 2"]
        assert ranks[0][f"{size} differ"] == []  # loaded from either form of the checkpoint
    assert ranks[0] == ranks[1]
    for size in ("toy", "toy-moe"):
        for how in ("greedy", "drawn", "fastv", "sparsevlm"):
            one, two = (ranks[0][f"{size} {how} {number}"] for number in (1, 2))
            assert one == two
            assert len({tokens for answer in one for tokens in answer}) > 4
        others = ("drawn", "fastv", "sparsevlm")
        assert ranks[0][f"{size} greedy 1"] not in [ranks[0][f"{size} {how} 1"] for how in others]
