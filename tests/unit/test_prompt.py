import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidPromptError
from service.prompt import (
    MAX_MASK_INPUTS,
    MAX_POINTS,
    MAX_PROMPTS,
    Box,
    Point,
    Prompt,
    batches_from_prompts,
    check_prompts,
)
from service.tensors import LABEL_NOT_A_POINT, LABEL_PADDING, PROMPT_BUCKETS, TOKEN_BUCKETS

SIZE = (40, 60)
SIDE = 8
MASK = np.linspace(-9, 9, SIDE * SIDE).astype("<f2").tobytes()


@pytest.mark.parametrize(
    ("prompt", "field", "says"),
    [
        (Prompt(), "prompts[0]", "empty"),
        (Prompt((Point(61, 1),)), "prompts[0].points[0].x", "0..60"),
        (Prompt((Point(1, 1), Point(1, -0.5))), "prompts[0].points[1].y", "0..40"),
        (Prompt((Point(math.nan, 1),)), "prompts[0].points[0].x", "nan"),
        (Prompt((Point(1, math.inf),)), "prompts[0].points[0].y", "inf"),
        (Prompt((Point(1, 1, 2),)), "prompts[0].points[0].label", "1 (foreground) or 0"),
        (Prompt(box=Box(5, 5, 5, 9)), "prompts[0].box", "x0 < x1"),
        (Prompt(box=Box(5, 9, 7, 5)), "prompts[0].box", "y0 < y1"),
        (Prompt(box=Box(0, 0, 60, 41)), "prompts[0].box.y1", "0..40"),
        (Prompt((Point(1, 1),) * (MAX_POINTS + 1)), "prompts[0].points", str(MAX_POINTS)),
        (Prompt(mask_input=b""), "prompts[0].mask_input", "128 bytes"),
        (Prompt(mask_input=MASK[:-2]), "prompts[0].mask_input", "8 x 8"),
        (Prompt((Point(1, 1),), mask_input=MASK + MASK), "prompts[0].mask_input", "128 bytes"),
        (Prompt(mask_input=MASK[:-2] + b"\x00\x7e"), "prompts[0].mask_input", "finite"),
        (Prompt(mask_input=MASK[:-2] + b"\x00\xfc"), "prompts[0].mask_input", "finite"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_field_and_bound(prompt: Prompt, field: str, says: str) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        check_prompts([prompt], SIZE, SIDE)
    assert caught.value.field == field
    assert says in caught.value.message


@pytest.mark.parametrize("count", [0, MAX_PROMPTS + 1])
def test_the_number_of_prompts_is_bounded(count: int) -> None:
    with pytest.raises(InvalidPromptError, match=str(MAX_PROMPTS)):
        check_prompts([Prompt((Point(1, 1),))] * count, SIZE, SIDE)


def test_the_image_s_own_border_is_inside() -> None:
    check_prompts([Prompt((Point(0, 0), Point(60, 40)), Box(0, 0, 60, 40))], SIZE, SIDE)


points = st.builds(Point, st.floats(0, 60), st.floats(0, 40), st.sampled_from([0, 1]))
prompts = st.builds(
    Prompt, st.lists(points, min_size=1, max_size=MAX_POINTS).map(tuple), st.sampled_from([None, Box(1, 2, 30, 20)])
)


@given(st.lists(prompts, min_size=1, max_size=8))
def test_batches_keep_every_token_in_order_and_pad_the_rest_inertly(asked: list[Prompt]) -> None:
    (batch,) = batches_from_prompts(asked, (2.0, 3.0))
    assert batch.places == tuple(range(len(asked)))
    assert batch.masks is None
    assert batch.coords.shape[0] in PROMPT_BUCKETS
    assert batch.coords.shape[1] in TOKEN_BUCKETS
    for prompt, coords, labels in zip(asked, batch.coords, batch.labels, strict=False):
        expected = [(p.x * 2, p.y * 3, p.label) for p in prompt.points]
        expected += [(2, 6, 2), (60, 60, 3)] if prompt.box else [(0, 0, LABEL_NOT_A_POINT)]
        real = np.column_stack((coords, labels))[: len(expected)]
        np.testing.assert_array_equal(real, np.array(expected, np.float32))
        assert (labels[len(expected) :] == LABEL_PADDING).all()


def test_more_prompts_than_the_largest_bucket_become_several_batches() -> None:
    asked = [Prompt((Point(i % 60, 1),)) for i in range(PROMPT_BUCKETS[-1] + 3)]
    batches = list(batches_from_prompts(asked, (1.0, 1.0)))
    assert [len(batch.places) for batch in batches] == [PROMPT_BUCKETS[-1], 3]
    assert batches[1].coords.shape[0] == 4
    assert batches[1].coords[0, 0, 0] == asked[PROMPT_BUCKETS[-1]].points[0].x


def test_the_number_of_mask_inputs_is_bounded() -> None:
    check_prompts([Prompt(mask_input=MASK)] * MAX_MASK_INPUTS, SIZE, SIDE)
    with pytest.raises(InvalidPromptError, match=str(MAX_MASK_INPUTS)):
        check_prompts([Prompt(mask_input=MASK)] * (MAX_MASK_INPUTS + 1), SIZE, SIDE)


masked = st.builds(Prompt, st.lists(points, max_size=3).map(tuple), st.none(), st.just(MASK))


@given(st.lists(prompts | masked, min_size=1, max_size=150))
def test_prompts_with_and_without_mask_inputs_are_batched_apart_in_as_few_batches_as_may_be(
    asked: list[Prompt],
) -> None:
    batches = list(batches_from_prompts(asked, (1.0, 1.0)))
    assert sorted(place for batch in batches for place in batch.places) == list(range(len(asked)))
    for has_mask in (False, True):
        count = sum((prompt.mask_input is not None) == has_mask for prompt in asked)
        some = [batch for batch in batches if (batch.masks is not None) == has_mask]
        assert len(some) == math.ceil(count / PROMPT_BUCKETS[-1])
        assert all((asked[place].mask_input is not None) == has_mask for batch in some for place in batch.places)


def test_mask_inputs_lie_in_their_rows_and_zeros_in_the_padding_s() -> None:
    other = np.full((SIDE, SIDE), 3, "<f2")
    asked = [Prompt(mask_input=MASK), Prompt((Point(1, 1),)), Prompt((Point(2, 2),), mask_input=other.tobytes())]
    plain, refined = batches_from_prompts([*asked, asked[0]], (1.0, 1.0))
    assert (plain.places, refined.places) == ((1,), (0, 2, 3))
    assert refined.masks is not None
    assert (refined.masks.shape, refined.masks.dtype) == ((4, SIDE, SIDE), np.float16)
    np.testing.assert_array_equal(refined.masks[0], np.frombuffer(MASK, "<f2").reshape(SIDE, SIDE))
    np.testing.assert_array_equal(refined.masks[1], other)
    assert not refined.masks[3].any()


def test_a_mask_input_alone_has_no_token_as_in_the_original_and_is_not_ambiguous() -> None:
    (batch,) = batches_from_prompts([Prompt(mask_input=MASK)], (1.0, 1.0))
    assert (batch.labels == LABEL_PADDING).all()
    assert Prompt((Point(1, 1),)).is_ambiguous
    assert not Prompt((Point(1, 1),), mask_input=MASK).is_ambiguous
