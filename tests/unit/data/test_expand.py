"""Expansion against a loop over tokens; a pack against its samples one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import check_image_tokens
from megatron_vico.data.samples import EncodedSample
from megatron_vico.errors import SampleError

IMAGE = 5
COUNTS = {"tokens_kept": 4, "tokens_compressed": 1, "image_token_id": IMAGE}


def naive(sample, plan):
    """Ids, visual positions and response rows, one token at a time."""
    ids, visual, rows = [], [], []
    tiles = iter(plan)
    for token, trained in zip(sample.token_ids, sample.is_response, strict=True):
        if trained:
            rows.append(len(ids) - 1)
        if token == IMAGE:
            for _ in range(1 if next(tiles) else 4):
                visual.append(len(ids))
                ids.append(IMAGE)
        else:
            ids.append(int(token))
    return ids, visual, rows


@st.composite
def samples_and_plans(draw):
    token_ids = np.array(
        draw(st.lists(st.sampled_from([IMAGE, 7, 8, 9]), min_size=1, max_size=30)), dtype=np.int64
    )
    trained = np.array(
        draw(st.lists(st.booleans(), min_size=len(token_ids), max_size=len(token_ids))), dtype=bool
    )
    trained &= token_ids != IMAGE
    trained[0] = False
    num_tiles = int((token_ids == IMAGE).sum())
    plan = torch.tensor(
        draw(st.lists(st.booleans(), min_size=num_tiles, max_size=num_tiles)), dtype=torch.bool
    )
    return sample(token_ids, trained, num_tiles), plan


def sample(token_ids, is_response, num_tiles):
    return EncodedSample(
        key="k",
        token_ids=np.array(token_ids, dtype=np.int64),
        is_response=np.array(is_response, dtype=bool),
        tiles=np.zeros((num_tiles, 3, 2, 2), dtype=np.uint8),
        tiles_per_image=(num_tiles,),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(samples_and_plans(), min_size=1, max_size=4))
def test_expansion_equals_a_loop_and_a_pack_equals_its_samples(drawn):
    joined = {"ids": [], "visual": [], "rows": [], "cu": [0]}
    for each, plan in drawn:
        ids, visual, rows = naive(each, plan)
        stream = expand([each], plan=plan, **COUNTS)
        assert stream.token_ids.tolist() == ids
        assert stream.visual_positions.tolist() == visual
        assert stream.response_rows.tolist() == rows
        # Whatever the plan is, rows predict the same labels.
        np.testing.assert_array_equal(stream.token_ids[stream.response_rows + 1], each.labels)
        start = joined["cu"][-1]
        joined["ids"] += ids
        joined["visual"] += [start + position for position in visual]
        joined["rows"] += [start + row for row in rows]
        joined["cu"].append(start + len(ids))
    packed = expand([s for s, _ in drawn], plan=torch.cat([plan for _, plan in drawn]), **COUNTS)
    assert packed.token_ids.tolist() == joined["ids"]
    assert packed.visual_positions.tolist() == joined["visual"]
    assert packed.response_rows.tolist() == joined["rows"]
    assert packed.cu_seqlens.tolist() == joined["cu"]
    assert (packed.cu_seqlens.dtype, packed.token_ids.dtype) == (torch.int32, torch.int64)


@pytest.mark.parametrize(
    ("token_ids", "is_response", "num_tiles", "message"),
    [
        ([7, IMAGE, 8], [0, 0, 1], 2, "'k': 1 image placeholders but 2 tiles"),
        ([7, 8], [1, 1], 0, "'k': the first token is a response"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(token_ids, is_response, num_tiles, message):
    with pytest.raises(SampleError, match=message):
        check_image_tokens(sample(token_ids, is_response, num_tiles), image_token_id=IMAGE)


def test_a_plan_for_other_tiles_is_refused():
    with pytest.raises(SampleError, match="'k': a plan for 2 tiles but 1"):
        expand([sample([7, IMAGE, 8], [0, 0, 1], 1)], plan=torch.zeros(2).bool(), **COUNTS)
