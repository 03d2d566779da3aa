"""Safetensors files in slices: reading, types, layouts, and which tensors belong together."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from helpers.safetensors_files import TORCH, write, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from taskvec.core.errors import TaskvecError
from taskvec.encoders.loaders.hf.saved import shards as loaded_shards
from taskvec.merging.matching import match, patterns
from taskvec.weights.flat import read
from taskvec.weights.reader import Checkpoint, labels, same_tensor, widen
from taskvec.weights.writer import LARGEST, Shard, Writer, narrow, peak, shards

bits = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


# ---------------------------------------------------------------- numbers


def test_every_half_number_is_widened_as_torch_does() -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    for dtype, kind in (("BF16", np.uint16), ("F16", np.float16)):
        want = torch.from_numpy(raw.view(np.int16)).view(TORCH[dtype]).float().numpy()
        np.testing.assert_array_equal(widen(raw.view(kind), dtype), want)


@settings(deadline=None)
@given(bits)
def test_numbers_are_rounded_as_torch_does_and_nan_stays_nan(patterns: list[int]) -> None:
    values = np.array(patterns, np.uint32).view(np.float32)
    for dtype in ("BF16", "F16"):
        with np.errstate(over="ignore"):
            found = widen(narrow(values, dtype), dtype)
        np.testing.assert_array_equal(found, torch.from_numpy(values).to(TORCH[dtype]).float().numpy())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_largest_is_where_rounding_gives_infinity(dtype: str) -> None:
    limit = torch.tensor(LARGEST[dtype], dtype=torch.float64 if dtype == "F32" else torch.float32)
    below = torch.nextafter(limit, torch.zeros_like(limit))
    assert torch.isinf(limit.to(TORCH[dtype]))
    assert torch.isfinite(below.to(TORCH[dtype]))


def test_the_peak_of_nan_is_nan() -> None:
    assert peak(np.array([1.0, -3.0], np.float32)) == 3
    assert np.isnan(peak(np.array([1.0, np.nan], np.float32)))
    assert peak(np.array([-np.inf, 1.0], np.float32)) == np.inf
    assert peak(np.empty(0, np.float32)) == 0


# ---------------------------------------------------------------- reading


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 30), st.integers(0, 30), st.sampled_from(sorted(TORCH)))
def test_slices_are_those_of_the_tensor(start: int, length: int, dtype: str) -> None:
    tensor = torch.randn(5, 6, generator=torch.Generator().manual_seed(start)).to(TORCH[dtype])
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "m.safetensors", {"a": torch.ones(3, dtype=torch.uint8), "b": tensor})
        with Checkpoint(path) as file:
            stop = min(30, start + length)
            found = torch.from_numpy(np.array(file.read("b", min(start, stop), stop)))
    assert torch.equal(found.double(), tensor.flatten()[start:stop].double())


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    a, b = {"x": torch.randn(2, 2)}, {"y": torch.randn(3), "n": torch.tensor(3)}
    with Checkpoint(write_shards(tmp_path / "m", a, b)) as model:
        assert set(model.tensors) == {"x", "y", "n"}
        assert model.read("y", 0, 3).tolist() == b["y"].tolist()
        assert b"".join(piece for _, piece in model.pieces("n")) == b["n"].numpy().tobytes()


def damage(folder: Path, how: str) -> Path:
    path = write(folder / "m.safetensors", {"a": torch.arange(100.0), "b": torch.ones(2)})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if how == "cut":
        path.write_bytes(data[:-10])
    elif how == "too long":
        path.write_bytes(data + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no header":
        path.write_bytes(b"\xff" * 100)
    elif how == "no JSON":
        path.write_bytes(data[:8] + b"x" * size + data[8 + size :])
    elif how == "overlap":
        header["b"]["data_offsets"] = [0, 8]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif how == "shape":
        header["a"]["shape"] = [7]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif how == "pickle":
        path = path.rename(folder / "m.bin")
    elif how == "two files":
        write(folder / "n.safetensors", {"a": torch.ones(1)})
        return folder
    elif how == "no shard":
        write_shards(folder / "s", {"a": torch.ones(1)}, {"b": torch.ones(1)})
        (folder / "s" / "model-00002-of-00002.safetensors").unlink()
        return folder / "s"
    elif how == "wrong shard":
        write_shards(folder / "s", {"a": torch.ones(1)}, {"b": torch.ones(1)})
        write(folder / "s" / "model-00002-of-00002.safetensors", {"c": torch.ones(1)})
        return folder / "s"
    elif how == "nothing":
        return folder / "nothing.safetensors"
    return path


DAMAGES = {
    "cut": "cannot be read", "too long": "cannot be read", "empty": "no header", "no header": "no header",
    "no JSON": "header is wrong", "overlap": "'b'|'a'", "shape": "'a'", "pickle": "save_file",
    "two files": "no single model", "no shard": "00002", "wrong shard": "index of", "nothing": "no weights",
}  # fmt: skip


@pytest.mark.parametrize("how", sorted(DAMAGES))
def test_damaged_files_are_clear_errors_that_name_the_file(tmp_path: Path, how: str) -> None:
    path = damage(tmp_path, how)
    with pytest.raises(TaskvecError, match=DAMAGES[how]) as caught:
        Checkpoint(path)
    assert path.name in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, Infinity]}}',
        '{"a": {"dtype": "F32", "shape": [1.7], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        '{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}",
    ],
    ids=["infinite", "fraction", "bool", "surrogate", "deep"],
)
def test_odd_headers_are_clear_errors(tmp_path: Path, header: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4)
    with pytest.raises(TaskvecError, match="odd.safetensors' cannot be read as safetensors: its header is wrong"):
        Checkpoint(path)


def test_labels_are_as_short_as_tells_checkpoints_apart(tmp_path: Path) -> None:
    for name in ("a/cars/model.safetensors", "a/dtd/model.safetensors", "b/cars/x.safetensors"):
        write(tmp_path / name, {"w": torch.ones(1)})
    a, b, c = (
        tmp_path / name for name in ("a/cars/model.safetensors", "a/dtd/model.safetensors", "b/cars/x.safetensors")
    )
    assert labels([a, b, c]) == ["cars", "dtd", "x"]
    assert labels([a, tmp_path / "b" / "cars"]) == ["a/cars", "b/cars"]
    assert labels([c, c]) == ["x (1)", "x (2)"]


# ---------------------------------------------------------------- writing


def test_what_is_written_in_pieces_is_read_by_the_library(tmp_path: Path) -> None:
    state = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "x": torch.randn(2, 3),
        "none": torch.empty(0, 4),
        "n": torch.tensor(7),
    }
    with Checkpoint(write(tmp_path / "in.safetensors", state, {"format": "pt", "ü": "é"})) as model:
        layout = shards(model, one="out.safetensors")
        writer = Writer(tmp_path, layout)
        for name in reversed(list(model.tensors)):
            for start, piece in model.pieces(name):
                for i in range(len(piece)):
                    writer.write(name, start + i, piece[i : i + 1])
        writer.finish()
        with Checkpoint(tmp_path / "out.safetensors") as copy:
            assert copy.metadata == model.metadata
            assert all(same_tensor(model, name, copy, name) for name in model.tensors)
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    header = layout[0].header()
    assert len(header) % 8 == 0


def test_a_file_with_a_gap_is_an_error_of_the_program(tmp_path: Path) -> None:
    writer = Writer(tmp_path, [Shard("o.safetensors", None, {"a": ("F32", (2,), 8)})])
    with pytest.raises(RuntimeError, match="8 bytes"):
        writer.finish()
    writer.close()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(4, 300))
def test_shards_hold_everything_once_and_stay_below_the_limit(counts: list[int], limit: int) -> None:
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "m.safetensors", {f"t{i}": torch.zeros(n) for i, n in enumerate(counts)})
        with Checkpoint(path) as model:
            layout = shards(model, limit=limit)
    assert sorted(name for shard in layout for name in shard.tensors) == sorted(model.tensors)
    assert all(shard.length <= limit or len(shard.tensors) == 1 for shard in layout)
    assert len({shard.name for shard in layout}) == len(layout)


# ---------------------------------------------------------------- matching


def pair(folder: Path, base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> tuple[Checkpoint, Checkpoint]:
    return (
        Checkpoint(write(folder / "base.safetensors", base)),
        Checkpoint(write(folder / "tuned.safetensors", tuned)),
    )


BASE = {
    "body.weight": torch.randn(4, 3), "body.bias": torch.randn(4), "head.weight": torch.randn(10, 4),
    "head.bias": torch.randn(10), "steps": torch.tensor(1), "index": torch.arange(4).reshape(2, 2),
}  # fmt: skip
CHANGES = {
    "missing": ({"body.bias": None}, r"is missing 'body\.bias'", "saved with the same names"),
    "extra": ({"other": torch.ones(1)}, r"beyond the base's, 'other'", "saved with the same names"),
    "head": (
        {"head.weight": torch.ones(3, 4), "head.bias": torch.ones(3)},
        r"'head\.weight' has shape \[3, 4\]",
        "--exclude 'head.*'",
    ),
    "type": ({"body.bias": torch.ones(4, dtype=torch.int8)}, r"'body\.bias' has type I8 instead of F32", "saved with"),
    "quantised": ({"index": torch.zeros(2, 2, dtype=torch.int64)}, r"'index' \(I64\) differs", "quantised"),
    "another": (dict.fromkeys(BASE) | {"x": torch.ones(1)}, "does not fit", "fine-tuned from this base"),
}  # fmt: skip


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_what_does_not_fit_is_refused_by_name_with_what_mends_it(tmp_path: Path, change: str) -> None:
    changed, message, fix = CHANGES[change]
    tuned = {name: tensor for name, tensor in (BASE | changed).items() if tensor is not None}
    base, other = pair(tmp_path, BASE, tuned)
    with pytest.raises(TaskvecError, match=message) as caught:
        match(base, [other])
    assert "refused" in caught.value.problem
    assert "tuned.safetensors" in caught.value.problem
    assert fix in caught.value.fix


def test_heads_of_another_size_are_carried_and_accounted_for(tmp_path: Path) -> None:
    base, other = pair(
        tmp_path, BASE, BASE | {"head.weight": torch.ones(3, 4), "head.bias": torch.ones(3), "head.new": torch.ones(1)}
    )
    matched = match(base, [other], ["head.*"])
    assert set(matched.merged) == {"body.weight", "body.bias"}
    assert set(matched.excluded) == {"head.weight", "head.bias"}
    assert set(matched.integers) == {"steps", "index"}
    assert set(matched.unused[0]) == {"head.weight", "head.bias", "head.new"}


def test_counters_may_differ_and_a_pattern_without_a_match_is_an_error(tmp_path: Path) -> None:
    base, other = pair(tmp_path, BASE, BASE | {"steps": torch.tensor(900)})
    assert "steps" in match(base, [other]).integers
    with pytest.raises(TaskvecError, match=r"'hed\.\*'"):
        match(base, [other], ["hed.*"])


def test_nothing_to_merge_is_an_error(tmp_path: Path) -> None:
    base, other = pair(tmp_path, BASE, BASE)
    with pytest.raises(TaskvecError, match="no floating-point tensor"):
        match(base, [other], ["*"])


def test_types_that_cannot_be_computed_with_are_refused(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "q": torch.ones(4).to(torch.float8_e4m3fn)}
    base, other = pair(tmp_path, state, state)
    with pytest.raises(TaskvecError, match="'q' has type F8_E4M3"):
        match(base, [other])
    assert match(base, [other], ["q"]).carried == ("q",)


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": ["a"]},
        {"__metadata__": {"a": 1}},
        {"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "I64", "shape": [5], "data_offsets": [0, 4]}},
    ],
)
def test_a_header_that_others_would_refuse_is_refused(tmp_path: Path, header: dict[str, object]) -> None:
    text = json.dumps({"w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}} | header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 if "x" in header else 0))
    with pytest.raises(TaskvecError, match="cannot be read as safetensors"):
        Checkpoint(path)


@pytest.mark.parametrize("change", [{"weight_map": {"w": 1}}, {"metadata": ["a"]}])
def test_an_index_that_is_none_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write_shards(tmp_path / "a", {"w": torch.ones(2)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(TaskvecError, match="no index of shards"):
        Checkpoint(folder)


def test_labels_are_those_of_links_and_not_of_what_they_point_to(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs" / "0a1b", {"w": torch.ones(2)})
    links = [tmp_path / name / "model.safetensors" for name in ("cars", "dtd")]
    for link in links:
        link.parent.mkdir()
        link.symlink_to(blob)
    assert labels(links) == ["cars", "dtd"]


@pytest.mark.parametrize("once", ["base", "tuned"])
def test_tied_weights_may_be_stored_once_or_twice(tmp_path: Path, once: str) -> None:
    table, changed = torch.randn(5, 3), torch.randn(5, 3)
    twice = {"embed": table, "lm_head": table.clone(), "norm": torch.ones(3)}
    tuned = {"embed": changed, "lm_head": changed.clone(), "norm": torch.ones(3)}
    (twice if once == "base" else tuned).pop("lm_head")
    base, other = pair(tmp_path, twice, tuned)
    matched = match(base, [other])
    assert set(matched.merged) == {"embed", "norm"}
    assert matched.tied == ({} if once == "base" else {"lm_head": "embed"})
    assert matched.unused == ((("lm_head",) if once == "base" else ()),)
    if once == "tuned":
        assert matched.sources[0]["lm_head"] == "embed"


def test_tensors_that_are_alike_by_chance_are_no_twins(tmp_path: Path) -> None:
    state = {"a": torch.zeros(3, 3), "b": torch.zeros(3, 3), "c": torch.randn(3), "d": torch.randn(2, 2)}
    base, other = pair(tmp_path, state, {name: tensor for name, tensor in state.items() if name != "b"})
    with pytest.raises(TaskvecError, match="is missing 'b'"):
        match(base, [other])


def test_patterns_name_a_module_once() -> None:
    assert patterns(["head.weight", "head.bias", "norm.weight", "cls"]) == ["head.*", "norm.weight", "cls"]


# ---------------------------------------------------------------- hostile files


def headed(folder: Path, header: bytes, body: int = 4) -> Path:
    path = folder / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    return path


def entry(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0, 4]") -> bytes:
    return f'{{"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}'.encode()


HEADERS = {
    "thousands of digits": entry(offsets=f"[0, {'4' * 5000}]"),
    "many digits in a shape": entry(shape=f"[{'9' * 4000}]"),
    "an overflowing product": entry(shape="[4294967296, 4294967296, 4294967296]"),
    "an overflowing product of nothing": entry(shape=f"[0, {2**70}]", offsets="[0, 0]"),
    "64 dimensions": entry(shape=str([1] * 64)),
    "a million dimensions": entry(shape=str([1] * 1_000_000)),
    "digits in a type": entry(dtype=f'"F{"9" * 5000}"'),
    "a type that is none": entry(dtype='{"F32": 1}'),
    "a shape that is an object": entry(shape="{}"),
    "a shape that is a text": entry(shape='"1"'),
    "a negative shape": entry(shape="[-1]"),
    "three offsets": entry(offsets="[0, 2, 4]"),
    "offsets the wrong way": entry(offsets="[4, 0]"),
    "NaN": entry(offsets="[0, NaN]"),
    "a name twice": entry()[:-1] + b", " + entry()[1:],
    "a field twice": entry(dtype='"I32", "dtype": "F32"'),
    "metadata twice": b'{"__metadata__": {"a": "1"}, "__metadata__": {"a": "2"}, ' + entry()[1:],
    "UTF-16": entry().decode().encode("utf-16"),
    "a list": b"[1, 2]",
    "nothing": b"",
    "a deep list": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", sorted(HEADERS))
def test_hostile_headers_are_clear_errors_wherever_they_are_read(tmp_path: Path, kind: str) -> None:
    path = headed(tmp_path, HEADERS[kind])
    for open_it in (Checkpoint, read):
        with pytest.raises(TaskvecError, match=r"odd\.safetensors' cannot be read as safetensors"):
            open_it(path)


def test_mutated_headers_end_in_errors_or_open(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"a": torch.ones(2, 3), "b": torch.arange(4)}, {"format": "pt"})
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    size, odd = int.from_bytes(whole[:8], "little"), 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, 8 + size, rng.integers(1, 4)):
            data[place] = rng.choice(np.frombuffer(b'0123456789[]{}",:-eE\\u\0\xff', np.uint8))
        path.write_bytes(data)
        try:
            Checkpoint(path).close()
        except TaskvecError as error:
            odd += 1
            assert "m.safetensors" in str(error)
    assert odd > 100


@pytest.mark.parametrize(
    "text",
    [
        '{"metadata": {"total_size": NaN}, "weight_map": {"w": "FILE"}}',
        '{"metadata": {"total_size": -Infinity}, "weight_map": {"w": "FILE"}}',
        '{"metadata": {"x": "\\ud800"}, "weight_map": {"w": "FILE"}}',
        '{"metadata": {"total_size": ' + "9" * 5000 + '}, "weight_map": {"w": "FILE"}}',
        '{"metadata": {"x": ' + "[" * 900 + "]" * 900 + '}, "weight_map": {"w": "FILE"}}',
        '{"metadata": {}, "weight_map": {"w": "other.safetensors", "w": "FILE"}}',
        '{"weight_map": {"w": "../FILE"}}',
        '{"weight_map": {"w": "\\u0000"}}',
        '{"weight_map": {"w": ""}}',
    ],
)
def test_an_index_that_could_not_be_written_is_refused_when_it_is_read(tmp_path: Path, text: str) -> None:
    folder = write_shards(tmp_path / "a", {"w": torch.ones(2)})
    index = folder / "model.safetensors.index.json"
    index.write_text(text.replace("FILE", "model-00001-of-00001.safetensors"))
    for open_it in (Checkpoint, lambda _: loaded_shards(index)):
        with pytest.raises(TaskvecError, match="model.safetensors.index.json"):
            open_it(folder)


def test_shards_in_folders_of_their_own_are_not_merged(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", {"w": torch.ones(2)})
    (folder / "below").mkdir()
    shard = (folder / "model-00001-of-00001.safetensors").rename(folder / "below" / "w.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "below/w.safetensors"}}')
    assert loaded_shards(folder / "model.safetensors.index.json") == [shard]
    with pytest.raises(TaskvecError, match="names the shard 'w.safetensors', which is not beside it"):
        Checkpoint(folder)


def test_of_two_sets_of_weights_the_whole_model_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "a", {"w": torch.ones(2)}, {"v": torch.ones(2)})
    write(folder / "model.safetensors", {"w": torch.zeros(2), "v": torch.zeros(2)})
    with Checkpoint(folder) as found:
        assert [file.name for file in found.files] == ["model.safetensors"]
        assert found.stem == "model" and not found.sharded
    said = capsys.readouterr().err
    assert "took 'model.safetensors', not those of 'model.safetensors.index.json'" in said
    with Checkpoint(folder / "model.safetensors.index.json") as found:
        assert found.read("w", 0, 2).tolist() == [1, 1]


def test_many_tensors_that_look_alike_take_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = torch.randn(64, 64)
    state = {f"x{i}": torch.cat([same, torch.full((1, 64), float(i // 2))]) for i in range(300)}
    base, tuned = pair(tmp_path, state, state)
    reads = []
    inner = Checkpoint._fill
    monkeypatch.setattr(Checkpoint, "_fill", lambda self, *args: (reads.append(1), inner(self, *args))[1])
    matched = match(base, [tuned])
    assert len(reads) <= 2 * 2 * 300
    assert matched.tied == {f"x{i + 1}": f"x{i}" for i in range(0, 300, 2)}
    fewer, _ = pair(tmp_path / "f", {name: t for name, t in state.items() if int(name[1:]) % 2 == 0}, state)
    assert len(match(fewer, [tuned]).merged) == 150


def exact(value: float, bits: int, lowest: int) -> Fraction:
    """Round to so many significant bits, ties to even, none below 2 ** lowest."""
    whole = Fraction(value)
    if not whole:
        return whole
    unit = Fraction(2) ** max(math.frexp(value)[1] - bits, lowest)
    return round(whole / unit) * unit


@settings(deadline=None, max_examples=300)
@given(st.floats(-6e4, 6e4), st.integers(-3, 3))
def test_float64_is_rounded_once(value: float, offset: int) -> None:
    pattern = int(np.float32(value).view(np.uint32)) & 0xFFFF0000 | 0x8000  # halfway between two numbers of bfloat16
    halfway = float(np.array([pattern], np.uint32).view(np.float32)[0])
    for one in (value, halfway * (1 + offset * 2.0**-40), value * 1e-38):
        values = np.array([one], np.float64)
        for dtype, bits, lowest in (("BF16", 8, -133), ("F16", 11, -24)):
            if abs(one) < 6e4:
                assert Fraction(float(widen(narrow(values, dtype), dtype)[0])) == exact(one, bits, lowest)


# ---------------------------------------------------------------- names

BLOCKS = {f"blocks.{i}.{part}": torch.randn(4, 4) for i in range(3) for part in ("attn.w", "mlp.w")}
NAMES = {"embed.w": torch.randn(5, 4), **BLOCKS, "norm.w": torch.randn(4)}


def put(state: dict[str, torch.Tensor], prefix: str, inside: dict[str, str] | None = None) -> dict[str, str]:
    """Return names in another style, by the names they stand for: a prefix, and texts that are replaced."""
    found = {}
    for name in state:
        other = name
        for old, new in (inside or {}).items():
            other = other.replace(old, new)
        found[name] = prefix + other
    return found


STYLES = {
    "prefix": ("", None, "vit.", None),
    "two prefixes": ("", None, "model.encoder.", None),
    "prefix of the base": ("vit.", None, "", None),
    "both": ("model.vit.", None, "net.backbone.", None),
    "compiled": ("", None, "_orig_mod.", None),
    "several devices, compiled": ("", None, "module._orig_mod.", None),
    "compiled blocks": ("", None, "", {"blocks.1.": "blocks.1._orig_mod."}),
    "one block": ("", None, "", {"blocks.0.attn.": "blocks.0.attn._orig_mod."}),
    "sharded": ("", None, "_fsdp_wrapped_module.", {"blocks.1.": "blocks.1._fsdp_wrapped_module."}),
    "recomputed": ("", None, "vit.module.", {"blocks.2.": "blocks.2._checkpoint_wrapped_module."}),
    "wrapped base": ("module.", {"blocks.1.": "blocks.1._orig_mod."}, "backbone.", None),
}


@pytest.mark.parametrize("style", sorted(STYLES))
def test_names_of_wrappers_and_classes_are_matched(
    tmp_path: Path, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, inside, after, within = STYLES[style]
    own, other = put(NAMES, before, inside), put(NAMES, after, within)
    base, tuned = pair(
        tmp_path, {own[n]: t for n, t in NAMES.items()}, {other[n]: t + 1 for n, t in reversed(NAMES.items())}
    )
    matched = match(base, [tuned])
    assert matched.sources[0] == {own[name]: other[name] for name in NAMES}
    assert set(matched.merged) == set(own.values())
    assert matched.carried == () and matched.unused == ((),)
    assert "has other names" in capsys.readouterr().err


def test_heads_outside_a_prefix_are_matched_by_their_own_names(tmp_path: Path) -> None:
    head = {"head.w": torch.randn(3, 4)}
    base, tuned = pair(tmp_path, NAMES | head, {f"backbone.{n}": t for n, t in NAMES.items()} | head)
    assert match(base, [tuned]).sources[0]["head.w"] == "head.w"


def test_what_has_no_counterpart_behind_a_prefix_is_kept_by_either_name(tmp_path: Path) -> None:
    classifier = {"classifier.weight": torch.randn(3, 4), "classifier.bias": torch.randn(3)}
    other = {f"module.vit.{n}": t for n, t in NAMES.items()} | {f"module.{n}": t for n, t in classifier.items()}
    base, tuned = pair(tmp_path, NAMES | {"pooler.dense.weight": torch.randn(4, 4)}, other)
    with pytest.raises(TaskvecError, match="refused 3 tensors") as caught:
        match(base, [tuned])
    advice = "--exclude 'pooler.dense.weight' --exclude 'classifier.*' carries the base's"
    assert caught.value.fix.startswith(advice)
    for pattern in ("classifier.*", "module.classifier.*"):
        matched = match(base, [tuned], ["pooler.*", pattern])
        assert matched.excluded == ("pooler.dense.weight",)
        assert set(matched.unused[0]) == {"module.classifier.weight", "module.classifier.bias"}


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.0.attn.w": "blocks.0.attention.w"},
        {"blocks.0.attn.w": "model.decoder.layers.0.w"},
        {"embed.w": "embedding.w"},
        {"blocks.1.mlp.w": "blocks.1.head.w"},
        {"norm.w": "multi_head_attention.w"},
        {"norm.w": "conv_head.w"},
        {"norm.w": "head.norm.w"},
        {"norm.w": "vision_model.head.probe"},
        {"embed.w": "vision_model.head.attention.w"},
    ],
)
def test_no_advice_would_leave_a_trained_tensor_behind(tmp_path: Path, change: dict[str, str]) -> None:
    base, tuned = pair(tmp_path, NAMES, {change.get(name, name): tensor for name, tensor in NAMES.items()})
    with pytest.raises(TaskvecError, match="refused 2 tensors") as caught:
        match(base, [tuned])
    assert "--exclude" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "classifier_distill.batch_norm.weight", "head.bn.bias", "decoder_blocks.0.attn.qkv.weight",
        "decoder_embed.bias", "blocks.0.attn.relative_position_index", "embeddings.position_ids",
    ],
)  # fmt: skip
def test_what_is_no_training_of_the_encoder_may_be_kept_of_the_base(tmp_path: Path, name: str) -> None:
    base, tuned = pair(tmp_path, NAMES, {f"vit.{n}": t for n, t in NAMES.items()} | {name: torch.ones(2, 2)})
    for one, other in ((base, tuned), (tuned, base)):
        with pytest.raises(TaskvecError, match="refused 1 tensors") as caught:
            match(one, [other])
        assert caught.value.fix.startswith(f"--exclude '{name}' carries the base's")


def test_counters_of_batch_norm_may_be_missing_or_beyond(tmp_path: Path) -> None:
    counter = {"bn.num_batches_tracked": torch.tensor(3)}
    base, tuned = pair(tmp_path, NAMES | counter, {f"model.{n}": t for n, t in NAMES.items()})
    assert match(base, [tuned]).integers == ("bn.num_batches_tracked",)
    assert match(tuned, [base]).unused == (("bn.num_batches_tracked",),)


def test_a_pattern_that_is_advised_leaves_trained_neighbours_alone() -> None:
    bad = ["head.weight", "head.bias"]
    assert patterns(bad, [*bad, "head.norm.weight"]) == bad
    assert patterns(bad, [*bad, "norm.weight"]) == ["head.*"]


def test_tensors_that_are_held_several_times_are_refused(tmp_path: Path) -> None:
    twice = {f"{part}.{n}": t + i for i, part in enumerate(("encoder_q", "encoder_k")) for n, t in NAMES.items()}
    base, tuned = pair(tmp_path, NAMES, twice)
    with pytest.raises(TaskvecError, match=r"several times, behind 'encoder_[qk]\.' and 'encoder_[qk]\.'"):
        match(base, [tuned])
    assert match(*(lambda a, b: (a, [b]))(*pair(tmp_path, twice, twice))).sources[0] == {n: n for n in twice}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["base_model.model.blocks.0.attn.lora_A.weight", "base_model.model.blocks.0.attn.lora_B.weight"], "unload"),
        (["lora_unet_blocks_0.lora_down.weight", "lora_unet_blocks_0.lora_up.weight"], "fuse_lora"),
        (["blocks.0.attn.w.absmax", "blocks.0.attn.w.quant_map"], "before they were quantised"),
        (["blocks.0.attn.qweight", "blocks.0.attn.qzeros"], "before they were quantised"),
        (["blocks.0.w.exp_avg", "blocks.0.w.exp_avg_sq"], "state_dict"),
        (["blocks.0.parametrizations.weight.original0"], "remove_parametrizations"),
        (["fc_norm.weight", "fc_norm.bias"], "class token"),
        (["pooler.layernorm.weight", "pooler.layernorm.bias"], "class token"),
        (["_fsdp_wrapped_module._flat_param"], "FULL_STATE_DICT"),
    ],
)
def test_files_that_hold_something_else_say_what_and_what_to_do(tmp_path: Path, names: list[str], told: str) -> None:
    base, tuned = pair(tmp_path, NAMES, NAMES | {name: torch.ones(2) for name in names})
    with pytest.raises(TaskvecError, match=r"tuned\.safetensors' holds ") as caught:
        match(base, [tuned])
    assert told in caught.value.fix
    assert "--exclude" not in caught.value.fix
