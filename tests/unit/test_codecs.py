"""Codecs: what is lost is bounded, what is biased is owed to the next update, no bytes are believed unchecked."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import tensors
from broker.codecs import SQUEEZED, Packing, is_known, packing
from broker.codecs.feedback import check_residual, owed
from broker.codecs.int8 import BUCKET
from broker.codecs.layout import BLOCK, Layout, is_coded, pack_bits, unpack_bits
from broker.codecs.powersgd import PowerSgd
from broker.codecs.qsgd import Qsgd
from broker.codecs.topk import TopK, read_gaps, write_gaps
from broker.errors import BadMessage, ConfigError, TaskError
from broker.tensors import Arrays

NAMES = (
    "none",
    "fp16",
    "bf16",
    "int8",
    "qsgd:127",
    "qsgd:7",
    "qsgd:1",
    "topk:0.01",
    "topk:0.3",
    "sign",
    "powersgd:2",
)
LOSSY = NAMES[1:]
BIASED = ("topk:0.01", "topk:0.3", "sign", "powersgd:2")
ALL = tuple(name + stage for name in NAMES for stage in ("", SQUEEZED))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def model(seed: int = 0, scale: float = 0.01) -> Arrays:
    """Matrices, a kernel, biases, normalisation statistics, a counter, a scalar, and an empty tensor."""
    draw = rng(seed)

    def normal(*shape: int, scale: float = scale) -> np.ndarray:
        return draw.normal(0, scale, shape).astype(np.float32)

    return {
        "conv.weight": normal(8, 3, 5, 5),
        "conv.bias": normal(8),
        "norm.running_var": np.abs(normal(8)),
        "norm.num_batches_tracked": np.array(12, np.int64),
        "fc.weight": normal(300, 250, scale=10 * scale),  # more than one block
        "fc.half": normal(20, 30).astype(np.float16),
        "fc.double": normal(20, 30).astype(np.float64),
        "flat": normal(5000),
        "none": np.zeros((0, 7), np.float32),
        "mask": np.array([True, False]),
    }


def round_trip(name: str, delta: Arrays, seed: int = 0) -> Arrays:
    packed = packing(name).pack(delta, {}, rng(seed))
    return packing(name).unpack(packed.body, delta)


def sizes_of(encoded: Arrays) -> dict[str, int]:
    return {name: array.nbytes for name, array in encoded.items()}


# -- round trips and bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_what_comes_back_is_shaped_like_the_model(name: str) -> None:
    delta = model()
    tensors.check_like(round_trip(name, delta), delta)


@pytest.mark.parametrize("name", ALL)
def test_counters_flags_scalars_and_statistics_come_back_as_they_were(name: str) -> None:
    delta = model()
    back = round_trip(name, delta)
    for kept in ("norm.num_batches_tracked", "mask", "none"):
        np.testing.assert_array_equal(back[kept], delta[kept])
    for kept in ("conv.bias", "norm.running_var"):
        error = 2**-11 if name.removesuffix(SQUEEZED) in BIASED else 0
        np.testing.assert_allclose(back[kept], delta[kept], rtol=error, atol=0 if not error else 2**-25)


def test_the_rule_of_what_is_coded() -> None:
    def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
        return np.zeros(shape, dtype)

    assert is_coded(zeros(8, 8))
    assert is_coded(zeros(4096, dtype=np.float64))
    for kept in (zeros(), zeros(1), zeros(4095), zeros(9, 7), zeros(8, 8, dtype=np.int64), zeros(9000, dtype=bool)):
        assert not is_coded(kept)


@pytest.mark.parametrize("stage", ["", SQUEEZED])
def test_without_a_codec_every_bit_comes_back(stage: str) -> None:
    delta = model()
    assert tensors.encode(round_trip(f"none{stage}", delta)) == tensors.encode(delta)


FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)
TENSOR = st.lists(FLOATS, min_size=64, max_size=600).map(lambda values: np.array(values, np.float32).reshape(1, -1))


@given(TENSOR)
@settings(max_examples=60, deadline=None)
def test_fp16_and_bf16_round_to_the_nearest(values: np.ndarray) -> None:
    delta = {"w": values}
    half = round_trip("fp16", delta)["w"]
    inside = np.clip(values, -65504, 65504)
    assert (np.abs(half - inside) <= np.maximum(np.abs(inside) * 2.0**-11, 2.0**-25)).all()
    brain = round_trip("bf16", delta)["w"].astype(np.float64)
    assert (np.abs(brain - values) <= np.maximum(np.abs(values.astype(np.float64)) * 2.0**-8, 1e-40)).all()


def test_bf16_takes_the_even_one_of_two_that_are_as_near() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32).repeat(32).reshape(2, 32)
    back = round_trip("bf16", {"w": values})["w"]
    assert set(back[0]) == {1.0}
    assert set(back[1]) == {1 + 2**-6}


@given(TENSOR)
@settings(max_examples=60, deadline=None)
def test_int8_is_off_by_half_a_step_of_its_bucket_at_the_most(values: np.ndarray) -> None:
    back = round_trip("int8", {"w": values})["w"][0].astype(np.float64)
    for begin in range(0, values.size, BUCKET):
        bucket = values[0, begin : begin + BUCKET].astype(np.float64)
        step = np.abs(bucket).max() / 127
        assert (np.abs(back[begin : begin + BUCKET] - bucket) <= step * (0.5 + 1e-5) + 1e-43).all()


@pytest.mark.parametrize("name", ALL)
def test_all_zero_layers_stay_zero(name: str) -> None:
    """Dividing by the norm of an all-zero layer gives NaN."""
    delta = {name: np.zeros_like(array) for name, array in model().items()}
    for array in round_trip(name, delta).values():
        assert not array.any()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", ["fc.weight", "conv.bias", "fc.double", "flat"])
def test_what_is_not_finite_is_told_by_its_name(name: str, strange: float, tensor: str) -> None:
    delta = model()
    delta[tensor].reshape(-1)[3] = strange
    with pytest.raises(TaskError, match=tensor.replace(".", r"\.")):
        packing(name).pack(delta, {}, rng())


def test_doubles_beyond_float32_are_told_too() -> None:
    delta = {"w": np.full((10, 10), 1e300)}
    for name in LOSSY:
        with pytest.raises(TaskError):
            packing(name).pack(delta, {}, rng())


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_and_the_smallest_numbers_do_no_harm(name: str) -> None:
    largest = float(np.finfo(np.float32).max)
    values = np.resize(np.array([largest, -largest, 1e-45, -1e-45, 0.0], np.float32), (40, 50))
    for delta in ({"w": values}, {"w": np.full((40, 50), 1e-45, np.float32)}):
        assert not np.isnan(round_trip(name, delta)["w"]).any()


@pytest.mark.parametrize("name", ALL)
def test_equal_seeds_give_equal_bits_and_inputs_stay_as_they_were(name: str) -> None:
    delta, before = model(), model()
    residual = {"fc.weight": np.ones((300, 250), np.float32)}
    packed = packing(name).pack(delta, residual, rng(7))
    assert packed.body == packing(name).pack(delta, residual, rng(7)).body
    assert tensors.encode(delta) == tensors.encode(before)
    assert (residual["fc.weight"] == 1).all()


@pytest.mark.parametrize(("name", "most"), [("fp16", 0.51), ("int8", 0.27), ("qsgd:7", 0.13), ("sign", 0.04)])
def test_bytes_are_those_that_the_codec_promises(name: str, most: float) -> None:
    delta = {"w": rng().normal(size=(400, 500)).astype(np.float32)}
    assert len(packing(name).pack(delta, {}, rng()).body) < most * 800_000


def test_millions_of_values_take_no_loop_over_each() -> None:
    """A loop in Python over each value would take seconds and memory: temporaries are those of blocks."""
    delta = {"w": rng().normal(size=(2000, 1000)).astype(np.float32)}
    for name in LOSSY:
        tracemalloc.start()
        body = packing(name).pack(delta, {}, rng()).body
        packing(name).unpack(body, delta)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * delta["w"].nbytes, name


# -- QSGD --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_qsgd_is_unbiased(levels: int) -> None:
    """Deterministic rounding would be biased. The mean of many draws lies within six standard deviations."""
    delta, times = {"w": rng(3).standard_t(3, (8, 128)).astype(np.float32)}, 2000
    codec, draw = packing(f"qsgd:{levels}"), rng(4)
    backs = (codec.unpack(codec.pack(delta, {}, draw).body, delta)["w"] for _ in range(times))
    off = sum(back.astype(np.float64) for back in backs) / times - delta["w"]
    step = np.linalg.norm(delta["w"]) / levels
    up = np.abs(delta["w"]) / step % 1  # probability of the higher level
    deviation = step * np.sqrt(up * (1 - up) / times)
    assert (np.abs(off) <= 6 * deviation + 6 * step / times).all()
    assert abs((off * np.sign(delta["w"])).sum()) <= 5 * np.sqrt(np.square(deviation).sum())


@pytest.mark.parametrize("levels", [1, 7, 127])
def test_qsgd_has_the_variance_of_the_paper(levels: int) -> None:
    values = rng(3).normal(size=(1, 1024)).astype(np.float32)
    errors = [
        np.square(round_trip(f"qsgd:{levels}", {"w": values}, seed)["w"] - values).sum() for seed in range(200)
    ]
    bound = min(1024 / levels**2, np.sqrt(1024) / levels) * np.square(values).sum()
    assert np.mean(errors) <= bound


def test_qsgd_takes_the_euclidean_norm_of_each_bucket() -> None:
    """With the largest magnitude in place of the norm, the same levels mean other numbers."""
    values = rng(1).normal(size=(3, 1000)).astype(np.float32)
    encoded = Qsgd(127).encode(Layout({"w": values}), {"w": values}, rng())
    flat = values.reshape(-1)
    expected = [np.linalg.norm(flat[begin : begin + 1024]) for begin in range(0, 3000, 1024)]
    np.testing.assert_allclose(encoded["n"], expected, rtol=1e-6)


def test_qsgd_lets_no_outlier_spoil_other_buckets_or_layers() -> None:
    """One norm over everything would leave nothing of what is small."""
    quiet = rng(1).normal(size=(1, 1024)).astype(np.float32) * 1e-3
    loud = np.array([1e6] * 64, np.float32).reshape(1, 64)
    same_tensor = {"w": np.concatenate([np.full((1, 1024), 1e6, np.float32), quiet], axis=1)}
    back = round_trip("qsgd:127", {"a": loud, "b": quiet, "c": loud})["b"]
    assert np.linalg.norm(back - quiet) < 0.3 * np.linalg.norm(quiet)
    back = round_trip("qsgd:127", same_tensor)["w"][:, 1024:]
    assert np.linalg.norm(back - quiet) < 0.3 * np.linalg.norm(quiet)


def test_qsgd_never_goes_beyond_the_norm() -> None:
    for seed in range(50):
        values = np.zeros((1, 64), np.float32)
        values[0, 5] = rng(seed).normal() * 10.0 ** rng(seed).integers(-30, 30)
        back = round_trip("qsgd:127", {"w": values}, seed)["w"]
        np.testing.assert_allclose(back, values, rtol=1e-5)


# -- top-k -------------------------------------------------------------------------------------------------------


def largest_by_sorting(delta: Arrays, ratio: float) -> Arrays:
    """Written for this test: what top-k must send, with a stable sort of everything."""
    names = sorted(name for name in delta if is_coded(delta[name]))
    flat = np.concatenate([delta[name].reshape(-1) for name in names])
    chosen = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(np.ceil(ratio * flat.size)))]
    kept = np.zeros_like(flat)
    kept[chosen] = flat[chosen].astype(np.float16)
    ends = np.cumsum([delta[name].size for name in names])[:-1]
    return {n: part.reshape(delta[n].shape) for n, part in zip(names, np.split(kept, ends), strict=True)}


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.3, 0.5])
@pytest.mark.parametrize("spread", [0.01, 1000.0])
def test_top_k_sends_the_largest_of_all_tensors_together(ratio: float, spread: float) -> None:
    draw = rng(5)
    delta = {
        "a": draw.normal(size=(300, 400)).astype(np.float32),
        "b": (spread * draw.normal(size=(40, 50))).astype(np.float32),
        "ties": np.round(draw.normal(size=(50, 50))).astype(np.float32),
    }
    back = round_trip(f"topk:{ratio}", delta)
    for name, expected in largest_by_sorting(delta, ratio).items():
        np.testing.assert_array_equal(back[name], expected)


def test_top_k_of_equal_values_is_exactly_k_of_them() -> None:
    delta = {"w": np.ones((300, 300), np.float32)}
    back = round_trip("topk:0.01", delta)["w"].reshape(-1)
    assert np.flatnonzero(back).tolist() == list(range(900))


def test_top_k_sends_one_value_at_least() -> None:
    """k = 0 would send nothing for ever."""
    delta = {"w": np.arange(64, dtype=np.float32).reshape(8, 8)}
    back = round_trip("topk:0.0001", delta)["w"]
    assert np.flatnonzero(back).tolist() == [63]


def test_top_k_spends_nothing_on_tiny_tensors() -> None:
    """A k of its own for each bias would send one in ten of their values at 1 %; here they travel whole."""
    delta = model()
    encoded = TopK(0.01).encode(Layout(delta), delta, rng())
    assert encoded["h"].size == np.ceil(0.01 * sum(a.size for a in delta.values() if is_coded(a)))


@pytest.mark.parametrize(("ratio", "most"), [(0.001, 2.1), (0.01, 1.5), (0.1, 1.1), (0.25, 0.51)])
def test_places_take_few_bytes(ratio: float, most: float) -> None:
    """int32 indices would take four for each value; a bitmap is shorter where many are sent."""
    delta = {"w": rng().normal(size=(400, 500)).astype(np.float32)}
    sizes = sizes_of(TopK(ratio).encode(Layout(delta), delta, rng()))
    assert (sizes.get("gaps", 0) + sizes.get("bits", 0)) / (200_000 * ratio) <= most
    assert ("bits" in sizes) == (ratio > 0.1)


@given(st.sets(st.one_of(st.integers(0, 300), st.integers(0, (1 << 45) - 1)), max_size=50))
@settings(max_examples=200, deadline=None)
def test_places_come_back(places: set[int]) -> None:
    array = np.array(sorted(places), np.int64)
    np.testing.assert_array_equal(read_gaps(write_gaps(array), 1 << 45), array)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_increasing_places_or_refused(coded: bytes) -> None:
    try:
        places = read_gaps(np.frombuffer(coded, np.uint8), 1000)
    except BadMessage:
        return
    assert (np.diff(places) > 0).all()
    assert not places.size or (places[0] >= 0 and places[-1] < 1000)


@given(st.integers(1, 8), st.integers(0, 300), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_bits_come_back(bits: int, count: int, seed: int) -> None:
    codes = rng(seed).integers(0, 1 << bits, count + (BLOCK if seed % 5 == 0 else 0)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_bits(pack_bits(codes, bits), bits, codes.size), codes)


# -- error feedback ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIASED)
def test_what_was_decoded_and_the_last_residual_are_all_deltas(name: str) -> None:
    codec, residual = packing(name), {}
    sent, given_in = {}, {}
    for step in range(12):
        delta = model(step)
        packed = codec.pack(delta, residual, rng(step))
        residual = packed.residual
        for tensor, values in codec.unpack(packed.body, delta).items():
            sent[tensor] = sent.get(tensor, 0) + values.astype(np.float64)
            given_in[tensor] = given_in.get(tensor, 0) + delta[tensor].astype(np.float64)
    for tensor, left in residual.items():
        np.testing.assert_allclose(sent[tensor] + left, given_in[tensor], rtol=1e-4, atol=2e-6)
    assert not {"norm.num_batches_tracked", "mask"} & residual.keys()


@pytest.mark.parametrize("name", BIASED)
def test_feedback_brings_a_constant_delta_to_its_place(name: str) -> None:
    """Without a residual, what is small would never arrive."""
    delta = {"w": rng(2).normal(size=(30, 40)).astype(np.float32)}
    codec, total = packing(name), np.zeros((30, 40))
    residual: Arrays = {}
    for step in range(400):
        packed = codec.pack(delta, residual, rng(step))
        residual = packed.residual
        total += codec.unpack(packed.body, delta)["w"]
    np.testing.assert_allclose(total / 400, delta["w"], atol=0.6)
    assert np.linalg.norm(total / 400 - delta["w"]) < 0.35 * np.linalg.norm(delta["w"])


@pytest.mark.parametrize("name", ["none", "fp16", "bf16", "int8", "qsgd:127"])
def test_a_codec_without_feedback_pays_what_is_owed_and_owes_nothing(name: str) -> None:
    delta = {"w": np.zeros((10, 10), np.float32)}
    packed = packing(name).pack(delta, {"w": np.ones((10, 10), np.float32)}, rng())
    assert packed.residual == {}
    np.testing.assert_allclose(packing(name).unpack(packed.body, delta)["w"], 1, atol=0.2)


def test_a_residual_is_halved_for_each_round_missed() -> None:
    """It would grow stale: the model has moved on without it."""
    delta, residual = {"w": np.zeros((8, 8), np.float32)}, {"w": np.ones((8, 8), np.float32)}
    assert (owed(delta, residual)["w"] == 1).all()
    assert (owed(delta, residual, missed=3)["w"] == 0.125).all()
    assert not owed(delta, residual, missed=10**9)["w"].any()


def test_a_residual_of_another_model_is_refused() -> None:
    delta = model()
    residual = packing("topk:0.01").pack(delta, {}, rng()).residual
    check_residual(residual, delta)
    wrong: list[Callable[[], Arrays]] = [
        lambda: residual | {"other": np.zeros(3, np.float32)},
        lambda: residual | {"fc.weight": np.zeros((250, 300), np.float32)},
        lambda: residual | {"fc.weight": np.zeros((300, 250), np.float16)},
        lambda: residual | {"mask": np.zeros(2, np.float32)},
    ]
    for change in wrong:
        with pytest.raises(BadMessage):
            check_residual(change(), delta)


@pytest.mark.parametrize("name", BIASED)
def test_halves_of_kept_tensors_owe_their_rounding(name: str) -> None:
    delta = {"b": np.array([0.1, 65505.0], np.float32), "c": np.array([1 / 3], np.float32)}
    packed = packing(name).pack(delta, {}, rng())
    back = packing(name).unpack(packed.body, delta)
    assert back["b"][1] == 65505.0  # beyond float16: it stays float32
    assert packed.residual["c"] == delta["c"] - np.float16(1 / 3)


def test_power_sgd_finds_what_has_low_rank() -> None:
    draw = rng(1)
    matrix = (draw.normal(size=(60, 2)) @ draw.normal(size=(2, 80))).astype(np.float32)
    back = round_trip("powersgd:2", {"w": matrix})["w"]
    assert np.linalg.norm(back - matrix) < 2e-3 * np.linalg.norm(matrix)


def test_power_sgd_is_nearly_as_good_as_the_best_of_that_rank() -> None:
    """Four directions eight times as strong as all others; with one pass it is off by 1.65 times as much."""
    left, _, right = np.linalg.svd(rng(1).normal(size=(60, 80)), full_matrices=False)
    strengths = np.concatenate([np.full(4, 8.0), np.ones(56)])
    matrix = (left * strengths @ right).astype(np.float32)
    back = round_trip("powersgd:4", {"w": matrix}, seed=1)["w"]
    assert np.linalg.norm(back - matrix) < 1.2 * np.sqrt(56)


def test_power_sgd_keeps_what_it_would_make_longer() -> None:
    delta = {"thin": np.ones((2, 40), np.float32), "wide": np.ones((40, 40), np.float32)}
    encoded = PowerSgd(4).encode(Layout(delta), delta, rng())
    assert (encoded["p"].size, encoded["q"].size) == (160, 160)
    assert encoded["0"].shape == (2, 40)


# -- hostile input -----------------------------------------------------------------------------------------------


def encoded_of(name: str, delta: Arrays) -> tuple[Packing, Arrays]:
    codec = packing(name)
    return codec, dict(tensors.decode(codec.pack(delta, {}, rng()).body))


def refused(codec: Packing, encoded: Arrays, like: Arrays) -> str:
    with pytest.raises(BadMessage) as bad:
        dict(codec.unpack(tensors.encode(encoded), like))
    return str(bad.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_array_must_have_its_name_shape_and_dtype(name: str) -> None:
    like = model()
    codec, encoded = encoded_of(name, like)
    for victim, array in encoded.items():
        refused(codec, {n: a for n, a in encoded.items() if n != victim}, like)
        refused(codec, encoded | {victim: array.astype(np.int32)}, like)
        refused(
            codec,
            encoded
            | {
                victim: np.concatenate(
                    [array.reshape(-1), array.reshape(-1), array.reshape(-1)[:1], np.zeros(1, array.dtype)]
                )
            },
            like,
        )
        if array.size:
            refused(codec, encoded | {victim: array.reshape(1, *array.shape)}, like)
    refused(codec, encoded | {"extra": np.zeros(3, np.float32)}, like)
    refused(codec, {}, like)


@pytest.mark.parametrize(
    ("name", "array", "value"),
    [
        ("fp16", "h", np.nan), ("fp16", "h", np.inf), ("bf16", "b", 0x7F80), ("bf16", "b", 0x7FC1),
        ("int8", "s", np.nan), ("int8", "s", np.inf), ("int8", "s", -1.0),
        ("qsgd:127", "n", np.nan), ("qsgd:127", "n", -1.0), ("qsgd:127", "q", 255), ("qsgd:7", "q", 255),
        ("sign", "m", np.inf), ("sign", "m", -1.0), ("topk:0.01", "h", np.nan),
        ("powersgd:2", "p", np.inf), ("powersgd:2", "q", np.nan),
    ],
)  # fmt: skip
def test_values_that_no_encoder_writes_are_refused(name: str, array: str, value: float) -> None:
    like = model()
    codec, encoded = encoded_of(name, like)
    strange = encoded[array].copy()
    strange[0] = np.array(value).astype(strange.dtype)
    refused(codec, encoded | {array: strange}, like)


def test_a_place_beyond_the_model_and_too_many_or_too_few_places_are_refused() -> None:
    like = {"w": rng().normal(size=(100, 100)).astype(np.float32)}
    codec, encoded = encoded_of("topk:0.01", like)
    last = np.array([*range(99), 10_000], np.int64)
    assert "beyond" in refused(codec, encoded | {"gaps": write_gaps(last)}, like)
    assert "places" in refused(codec, encoded | {"gaps": write_gaps(last[:99])}, like)
    assert "places" in refused(codec, encoded | {"gaps": write_gaps(np.arange(101))}, like)
    codec, encoded = encoded_of("topk:0.5", like)
    assert "places" in refused(codec, encoded | {"bits": np.full(1250, 255, np.uint8)}, like)
    unknown = refused(codec, encoded | {"gaps": write_gaps(last)}, like)
    assert "gaps" in unknown


def test_numbers_without_end_or_without_measure_are_refused() -> None:
    for coded in (b"\x80", b"\x01\xff", b"\xff" * 7 + b"\x01", b"\xff" * 6 + b"\x7f"):
        with pytest.raises(BadMessage):
            read_gaps(np.frombuffer(coded, np.uint8), 1 << 40)
    many = np.tile(np.frombuffer(b"\xff" * 6 + b"\x7f", np.uint8), 1 << 15)
    with pytest.raises(BadMessage):
        read_gaps(many, 1 << 47)  # their sum turns int64 over


def test_what_unpacks_to_more_than_the_model_takes_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    like = model()
    tracemalloc.start()
    with pytest.raises(BadMessage, match="unpacks"):
        packing("int8+zstd").unpack(bomb, like)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=150, deadline=None)
def test_bytes_that_are_no_frame_are_refused(junk: bytes, framed: bool) -> None:
    with pytest.raises(BadMessage):
        packing("int8+zstd").unpack(zstandard.compress(junk) if framed else junk, model())


def test_a_frame_of_unknown_size_or_with_something_behind_is_refused() -> None:
    like = {"w": np.ones((8, 8), np.float32)}
    body = packing("fp16+zstd").pack(like, {}, rng()).body
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(zstandard.decompress(body))
    for wrong in (unsized, bytes(body) + b"more", bytes(body)[:-3]):
        with pytest.raises(BadMessage):
            packing("fp16+zstd").unpack(wrong, like)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_refused_or_gives_arrays_like_the_model(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ALL))
    like = {"w": rng().normal(size=(30, 40)).astype(np.float32), "b": np.ones(5, np.float32)}
    body = bytearray(packing(name).pack(like, {}, rng()).body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        back = packing(name).unpack(bytes(body), like)
    except BadMessage:
        return
    tensors.check_like(back, like)


# -- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", "gzip", "int8:4", "qsgd", "qsgd:", "qsgd:0", "qsgd:128", "qsgd:+3", "qsgd:1e2", "topk:0", "topk:0.0",
     "topk:1", "topk:0.6", "topk:nan", "topk:-0.1", "topk:.1", "powersgd:0", "powersgd:65", "int8+zstd+zstd",
     "+zstd", "zstd", "INT8", "int8 ", "qsgd:１", "x" * 5000],
)  # fmt: skip
def test_names_are_taken_literally(name: str) -> None:
    assert not is_known(name)
    with pytest.raises(ConfigError) as error:
        packing(name)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ALL)
def test_known_names_are_known(name: str) -> None:
    assert is_known(name)
    assert packing(name).name == name
