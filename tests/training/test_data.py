"""The shipped data is what it says, and bad input is named."""

import hashlib
import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fastrnn.training import (
    InputError,
    JapaneseVowels,
    LabelledData,
    MemoryData,
    SeriesData,
    TextData,
    Vocabulary,
)
from fastrnn.training.data import shipped
from fastrnn.training.data.batches import IGNORE, WindowBatches
from fastrnn.training.standardise import Standardise, mean_and_scale


def test_shipped_files_match_their_manifest_and_say_where_they_come_from() -> None:
    manifest = json.loads((shipped.FILES / "manifest.json").read_text())
    assert {f.name for f in shipped.FILES.glob("*.xz")} == {f"{name}.xz" for name in manifest}
    for name, entry in manifest.items():
        packed = (shipped.FILES / f"{name}.xz").read_bytes()
        assert hashlib.sha256(packed).hexdigest() == entry["sha256"]
        assert entry["licence"]
        assert entry["source"]


def test_damaged_shipped_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in shipped.FILES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "co2.csv.xz").write_bytes(b"not the file")
    monkeypatch.setattr(shipped, "FILES", tmp_path)
    with pytest.raises(InputError, match=r"co2\.csv\.xz is damaged"):
        shipped.read("co2.csv")
    with pytest.raises(InputError, match="no shipped data 'moon'"):
        shipped.read("moon")


def test_shakespeare_is_38_plays_cut_without_loss() -> None:
    data = TextData(rows=2)
    parts = data.parts
    assert len(data.documents) == 38
    pieces = {name: sum(map(len, part)) for name, part in parts.items()}
    assert sum(pieces.values()) == sum(map(len, data.documents))
    assert pieces["val"] == pytest.approx(0.05 * sum(pieces.values()), abs=1)
    vocabulary = Vocabulary(data.spec["vocabulary"])
    assert "To be, or not to be: that is the question" in "".join(data.documents)
    assert "".join(map(vocabulary.decode, parts["test"])) in "".join(data.documents)


def test_japanese_vowels_has_the_published_sizes() -> None:
    data = JapaneseVowels(held_out=5)
    sizes = {name: len(part[0]) for name, part in data.checked.items()}
    assert sizes == {"train": 225, "val": 45, "test": 370}
    lengths = [len(s) for part in data.checked.values() for s in part[0]]
    assert (min(lengths), max(lengths)) == (7, 29)
    assert data.checked["train"][0][0].shape[1] == 12
    assert len(data.spec["classes"]) == 9


def test_series_parts_follow_in_time_and_targets_follow_windows() -> None:
    data = SeriesData("co2", window=60, horizon=4, missing="interpolate")
    assert len(data.table) == 2284
    for part in ("train", "val", "test"):
        batch = data.batches(part, 0, 1).batch(0, 0)
        assert batch.x.shape[0] == 60
        assert batch.y.shape == (4, batch.x.shape[1], 1)
    batch = data.batches("val", 0, 1).batch(0, 0)  # in the given order
    assert torch.equal(batch.x[1:, 0], batch.x[:-1, 1])
    assert torch.equal(batch.y[:-1, 1], batch.y[1:, 0])
    assert torch.equal(batch.y[0, 0], batch.x[-1, 1])


def test_a_batch_of_windows_costs_the_same_from_a_long_series() -> None:
    """What a batch reads and copies is its own windows; the order alone is as long as the series."""
    series = torch.arange(2_000_000.0)[:, None].expand(-1, 3)  # one number a step: a copy would be 48 MB
    batches = WindowBatches(series, window=100, horizon=10, size=32, seed=0)
    assert len(batches) == -(-(2_000_000 - 109) // 32)
    assert batches.batch(0, 7).x.shape == (100, 32, 3)
    order = batches.order(0)
    assert batches.order(0) is order
    assert order.sort().values.equal(torch.arange(2_000_000 - 109))
    assert not batches.order(1).equal(order)
    x, lengths, y, weight = batches.batch(0, 7)
    starts = batches.order(0)[7 * 32 : 8 * 32].float()
    assert torch.equal(x[:, :, 0], starts + torch.arange(100.0)[:, None])
    assert torch.equal(y[:, :, 0], starts + torch.arange(100.0, 110.0)[:, None])
    assert lengths.tolist() == [100] * 32
    assert weight == 1.0


@pytest.mark.parametrize("seed", [None, 3])
def test_processes_share_the_windows_of_a_batch(seed: int | None) -> None:
    series = torch.randn(50, 2)
    whole = WindowBatches(series, 5, 2, 8, seed).batch(1, 2)
    parts = [WindowBatches(series, 5, 2, 8, seed, rank, 3).batch(1, 2) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.x, whole.x[:, rank::3])
        assert torch.equal(part.y, whole.y[:, rank::3])
    assert sum(p.weight for p in parts) == pytest.approx(3)


@pytest.mark.parametrize(
    "values",
    [
        1_700_000_000 + 60 * torch.arange(5000.0, dtype=torch.float64),  # a time stamp a minute
        1e8 + torch.sin(torch.arange(5000.0, dtype=torch.float64)),
        1e-30 * torch.randn(5000, dtype=torch.float64),
        1e-200 * torch.randn(5000, dtype=torch.float64),
        1e30 * torch.randn(5000, dtype=torch.float64),
    ],
)
def test_large_and_small_values_survive_standardising(values: torch.Tensor) -> None:
    found = mean_and_scale(values[:, None])
    unit = Fraction(float(values.abs().max()))  # exact arithmetic, on numbers that float holds
    exact = [Fraction(v) / unit for v in values.tolist()]
    mean = sum(exact) / len(exact)
    scale = math.sqrt(sum((v - mean) ** 2 for v in exact) / (len(exact) - 1)) * float(unit)
    assert found["mean"] == pytest.approx([float(mean * unit)], rel=1e-12, abs=1e-12 * scale)
    assert found["scale"] == pytest.approx([scale], rel=1e-7)
    standard = Standardise(found).bfloat16()  # the model's precision is not that of mean and scale
    scaled = standard(values[:, None])
    assert scaled.dtype == torch.float64
    assert scaled.std() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(standard.undo(scaled), values[:, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0, 1e8 / 3, -1e-30])
def test_a_column_that_is_constant_in_training_is_centred_only(value: float) -> None:
    column = torch.full((999, 1), value, dtype=torch.float64)
    assert mean_and_scale(column) == {"mean": [value], "scale": [1.0]}
    assert mean_and_scale(column[:1]) == {"mean": [value], "scale": [1.0]}
    rounded = torch.where(torch.arange(999)[:, None] % 2 == 0, column, column * (1 + 2**-52))
    assert mean_and_scale(rounded)["scale"] == [1.0]


def test_memory_problems_have_the_targets_they_state() -> None:
    adding = MemoryData("adding", length=30).batches("train", 0, 1).batch(0, 0)
    assert (adding.x[..., 1].sum(0) == 2).all()
    torch.testing.assert_close(adding.y[0, :, 0], adding.x.prod(-1).sum(0))
    parity = MemoryData("parity", length=30).batches("train", 0, 1).batch(0, 0)
    assert torch.equal(parity.y, parity.x.sum((0, 2)).long() % 2)
    after = torch.arange(len(parity.x))[:, None] >= parity.lengths
    assert not parity.x[after].any()
    copy = MemoryData("copy", length=30).batches("train", 0, 1).batch(0, 0)
    assert torch.equal(copy.y[copy.y != IGNORE].view(10, -1), copy.x[:10])


def test_made_up_batches_depend_on_epoch_and_number_only() -> None:
    one, two = (MemoryData("adding", length=9).batches("train", 0, 1) for _ in range(2))
    assert torch.equal(one.batch(3, 5).x, two.batch(3, 5).x)
    assert not torch.equal(one.batch(3, 5).x, one.batch(4, 5).x)
    assert not torch.equal(one.batch(3, 5).x, one.batch(3, 6).x)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"ab\xff", "not UTF-8 text: byte 2 cannot be read; set encoding"),
    ],
)
def test_unusable_text_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        TextData([str(path)]).documents  # noqa: B018
    with pytest.raises(InputError, match="cannot read"):
        TextData([str(tmp_path / "absent.txt")]).documents  # noqa: B018


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8", b"\xef\xbb\xbf"), ("utf-16", b""), ("cp1252", b"")])
def test_byte_order_marks_and_line_ends_are_no_characters(tmp_path: Path, encoding: str, mark: bytes) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(mark + "über\r\nab\rb".encode(encoding))
    assert TextData([str(path)], encoding=encoding).spec == {"vocabulary": "\naberü"}
    with pytest.raises(InputError, match="unknown encoding: morse"):
        TextData([str(path)], encoding="morse").documents  # noqa: B018


def test_a_prompt_begins_with_what_the_text_holds(tmp_path: Path, text: TextData) -> None:
    path = tmp_path / "genome"
    path.write_text("GATTACA" * 9)
    data = TextData([str(path)])
    assert data.predict_dataloader() == ["A"]
    assert text.predict_dataloader() == ["\n"]
    assert TextData([str(path)], prompts=("GA",)).predict_dataloader() == ["GA"]


def test_one_text_or_path_is_no_list_of_its_characters(tmp_path: Path) -> None:
    (path := tmp_path / "aa.csv").write_text("load\n" + "1\n2\n" * 20)
    for one in (path, str(path)):
        assert TextData(one, prompts="load").documents[0].startswith("load\n1\n")
    assert TextData(path, prompts="load").predict_dataloader() == ["load"]
    assert len(SeriesData(str(path), "load", window=2, horizon=1).table) == 40
    with pytest.raises(InputError, match="cannot read aab: No such file"):
        TextData("aab").documents  # noqa: B018
    with pytest.raises(InputError, match=r"cannot read .*encoding"):
        TextData(path, encoding=8).documents  # type: ignore[arg-type]  # noqa: B018


def test_a_part_too_short_for_its_rows_is_named(text: TextData) -> None:
    text.rows = 200
    with pytest.raises(InputError, match=r"val has \d+ characters: too short for 200 parallel rows"):
        text.batches("val", 0, 1)


def test_unknown_characters_are_shown_with_their_position() -> None:
    with pytest.raises(InputError, match=r"2 characters .*'ß', 'é'; the first is at position 1"):
        Vocabulary("abc").encode("aßbé")


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("", {}, "is empty"),
        ("a,b\n", {}, "a header but no rows"),
        ("a,b\n1,2\n", {"columns": ["c"]}, "no column c; there are a, b"),
        ("a,b\n1,2\n", {"columns": None}, "name the columns .* there are a, b"),
        ("a,b\n1,2\nx,3\n", {}, "line 3 .* is not a number"),
        ("a,b\n1,2\n1,3,5\n", {}, "line 3 .* more cells than the header's 2 columns"),
        ("a,b\n1,2\n", {"missing": "drop"}, "missing must be raise or interpolate, got 'drop'"),
        ("a,b\n1,2\n,3\n" + "1,2\n" * 50, {}, "1 missing values, the first in line 3, column a"),
        ("a,b\n1,2\n2,3\n3,4\n", {}, "train has 3 steps .* too short for a window of 8 and 2"),
        ("a,b\n1,2\n\n,3\n" + "1,2\n" * 50, {}, "1 missing values, the first in line 4, column a"),
        ("a,b\n,2\n,3\n", {"missing": "interpolate"}, "column a .* has no values at all"),
    ],
)
def test_unusable_csv_files_are_named(tmp_path: Path, text: str, settings: dict, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    given = {"columns": ["a", "b"], "window": 8, "horizon": 2, "held_out": (0.0, 0.0), **settings}
    with pytest.raises(InputError, match=words):
        SeriesData(str(path), **given).spec  # noqa: B018


def arrays(*lengths: int, features: int = 2) -> list[np.ndarray]:
    return [np.ones((n, features)) for n in lengths]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train": ([], [])}, "train must hold .* 0 arrays, 0 labels"),
        ({"train": (arrays(3), [1, 2])}, "1 arrays, 2 labels"),
        ({"test": (arrays(3), ["c"])}, "classes of test absent from training: c"),
        ({"val": (arrays(3, features=5), ["a"])}, r"val\[0\] must have 2 features .* got 5"),
        ({"val": (arrays(0), ["a"])}, r"val\[0\] must be \[T, I\], T > 0, I > 0; got \[0, 2\]"),
        ({"val": (arrays(3, features=0), ["a"])}, r"val\[0\] must be .* got \[3, 0\]"),
        ({"val": ([np.array([[1.0, np.nan]])], ["a"])}, "missing value at step 0, feature 1"),
        ({"val": ([np.array([[1, None]])], ["a"])}, "missing value at step 0, feature 1"),
        ({"val": ([np.ma.masked_equal([[1.0, 5.0]], 5)], ["a"])}, "missing value at step 0, feature 1"),
        ({"val": ([pd.DataFrame({"x": [1, None], "y": 2})], ["a"])}, "missing value at step 1, feature 0"),
        ({"val": ([[[1, 2], [3]]], ["a"])}, r"val\[0\] must be numbers \[T, I\]: .*inhomogeneous"),
        ({"val": ([np.array([[1], [2, 3]], dtype=object)], ["a"])}, r"val\[0\] must be numbers"),
        ({"val": ([np.array([[1, "2"]], dtype=object)], ["a"])}, r"val\[0\] must be numbers .*got object"),
        ({"val": (["abc"], ["a"])}, r"val\[0\] must be numbers .*got <U3"),
        ({"val": ([[[1j, 2.0]]], ["a"])}, "val.* got complex128"),
        ({"val": (torch.zeros(1, 3, 2, dtype=torch.complex64), ["a"])}, "val.* got complex64"),
        ({"val": ([[pd.Timestamp(0)]], ["a"])}, r"val\[0\] must be numbers"),
        ({"val": ([{}], ["a"])}, r"val\[0\] must be numbers"),
        ({"val": (torch.zeros(()), ["a"])}, "arrays of val must be a list or an array, got Tensor"),
        ({"val": arrays(3)}, r"val must be \(arrays, labels\), got list"),
        ({"val": None}, r"val must be \(arrays, labels\), got NoneType"),
        ({"train": (arrays(3, 4), ["a", "a"])}, "train has one class only, a: a classifier needs at least 2"),
        ({"train": (arrays(*[3] * 30), range(30)), "val": (arrays(2), [1])}, "absent from training: a"),
        ({"val": (arrays(*[3] * 30), range(30))}, "absent from training: 0, 1, 2, .*, 9 and 20 more$"),
        ({"val": (arrays(2), ["x" * 300])}, r"absent from training: x{57}\.\.\.$"),
        ({"val": (arrays(2), "a")}, "labels of val must be a list or an array, got str"),
        ({"val": (arrays(2, 3), {"a", "b"})}, "labels of val must be a list or an array, got set"),
        ({"val": (arrays(2, 3), torch.zeros(2, 1))}, r"labels of val must be \[N\], .* got \[2, 1\]"),
        (
            {"val": (arrays(2, 3), pd.DataFrame({"a": [1, 2]}))},
            r"labels of val must be \[N\], .* got \[2, 1\]",
        ),
        ({"val": (arrays(2), [[0, 1]])}, r"label of val\[0\] must be one value, got \[0, 1\]"),
        ({"val": (arrays(2), [torch.eye(2)])}, r"label of val\[0\] must be one value"),
        ({"val": (arrays(2), torch.zeros(1, device="meta"))}, r"label of val\[0\] cannot be read: .*no data"),
        ({"val": ([[[10**400, 1]]], ["a"])}, r"val\[0\] must be numbers \[T, I\]: int too large"),
        (
            {"val": ([np.array([[1.0, -np.inf]])], ["a"])},
            r"val\[0\] has -inf, infinite or .* step 0, feature 1",
        ),
        ({"val": ([np.array([[1.0, 2.0], [1e39, 2.0]])], ["a"])}, r"1e\+39, .* at step 1, feature 0"),
    ],
)
def test_unusable_arrays_are_named(parts: dict, words: str) -> None:
    good = (arrays(3, 4), ["a", "b"])
    with pytest.raises(InputError, match=words):
        LabelledData(**{"train": good, "val": good, "test": good, **parts}).spec  # noqa: B018


@pytest.mark.parametrize(
    "missing",
    [None, float("nan"), np.float32("nan"), torch.tensor(torch.nan), pd.NA, pd.NaT, np.inf, "", " "],
)
def test_a_missing_label_is_no_class(missing: object) -> None:
    good = (arrays(3, 4), ["a", "b"])
    with pytest.raises(InputError, match=r"train\[1\] has no label: "):
        LabelledData((arrays(3, 4, 5), ["a", missing, "b"]), good, good).spec  # noqa: B018
    masked = np.ma.masked_equal([1, 9, 2], 9)
    with pytest.raises(InputError, match=r"train\[1\] has no label: None"):
        LabelledData((arrays(3, 4, 5), masked), good, good).spec  # noqa: B018


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 2, 10],
        [0.0, 1.0, 2.0, 10.0],
        ["0", "1", "2", "10"],
        [b"0", b"1", b"2", b"10"],
        [0, 1.0, "2", torch.tensor([10])],
        (0, 1, 2, 10),
        range(3),
        np.array([0, 1, 2, 10], dtype=np.uint8),
        np.array([0, 1, 2, 10], dtype=np.float32),
        np.array(["0", "1", "2", "10"]),
        np.array(["0", 1, 2.0, np.int8(10)], dtype=object),
        torch.tensor([0, 1, 2, 10]),
        torch.tensor([0, 1, 2, 10], dtype=torch.bfloat16, requires_grad=True),
        pd.Series([0, 1, 2, 10], index=[7, 5, 3, 1]),
        pd.Series([0, 1, 2, 10], dtype="Int64"),
        pd.Series(["0", "1", "2", "10"], dtype="category"),
        pd.Categorical([0, 1, 2, 10]),
    ],
    ids=repr,
)
def test_one_class_has_one_name_whatever_its_labels_are(labels: object) -> None:
    good = (arrays(1, 2, 3, 4), [0, 1, 2, 10])
    count = len(labels)  # type: ignore[arg-type]
    data = LabelledData(good, (arrays(*range(1, count + 1)), labels), good)
    assert data.spec["classes"] == ["0", "1", "2", "10"]
    assert data.batches("val", 0, 1).batch(0, 0).y.tolist() == list(range(count))
    turned = LabelledData((arrays(*range(1, count + 1)), labels), *[(arrays(1), [1])] * 2)
    assert turned.spec["classes"] == ["0", "1", "2", "10"][:count]


def test_a_fraction_is_called_by_its_own_digits() -> None:
    labels = [0.1, np.float32(0.1), torch.tensor(0.1), "0.1", Decimal("2.0"), 2, Fraction(4, 2)]
    part = (arrays(*[1] * len(labels)), labels)
    assert LabelledData(part, part, part).spec["classes"] == ["0.1", "2"]


@pytest.mark.parametrize(
    "classes",
    [
        ["-10", "-2", "0", "0.25", "1.5", "1e1", "12"],
        ["take 2", "take 10", "take 10b", "tape"],
        ["-1", "7", "2nd", "10th", "a"],
        ["False", "True"],
        ["1" * 5000, "a" + "1" * 5000],
    ],
)
def test_classes_are_in_the_order_of_their_numbers(classes: list[str]) -> None:
    part = (arrays(*[1] * len(classes)), classes[::-1])
    assert LabelledData(part, part, part).spec["classes"] == classes


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a.tolist(),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(object),
        lambda a: a.astype(np.longdouble),
        lambda a: torch.from_numpy(a).requires_grad_(),
        lambda a: torch.from_numpy(a).bfloat16(),
        lambda a: [list(map(torch.tensor, row)) for row in a],
        pd.DataFrame,
        lambda a: np.ma.masked_equal(a, 99),
    ],
)
def test_sequences_are_taken_in_every_form(make: Callable[[np.ndarray], object]) -> None:
    numbers = np.arange(6.0).reshape(3, 2)
    data = LabelledData(*[([make(numbers), numbers + 1], ["a", "b"])] * 3)
    batch = data.batches("val", 0, 1).batch(0, 0)
    assert batch.x[:, 0].tolist() == numbers.tolist()
    stacked = LabelledData(*[(torch.from_numpy(np.stack([numbers, numbers + 1])), ["a", "b"])] * 3)
    assert torch.equal(stacked.batches("val", 0, 1).batch(0, 0).x, batch.x)


def test_features_far_from_zero_keep_their_shape() -> None:
    wave = 1e8 + np.sin(np.arange(40.0))
    part = ([np.stack([half, np.ones(20)], 1) for half in (wave[:20], wave[20:])], ["a", "b"])
    data = LabelledData(part, part, part)
    batch = data.batches("val", 0, 1).batch(0, 0)  # in the given order
    scaled = Standardise(data.spec)(batch.x).transpose(0, 1).flatten(0, 1)
    np.testing.assert_allclose(scaled[:, 0], (wave - wave.mean()) / wave.std(ddof=1), atol=1e-6)
    assert not scaled[:, 1].any()


def test_a_model_keeps_its_own_numbers_for_new_data() -> None:
    good = (arrays(3, 4), ["a", "b"])
    data = LabelledData(good, good, (arrays(2), ["b"]))
    data.adopt({**data.spec, "classes": ["z", "a", "b"]})
    assert data.batches("test", 0, 1).batch(0, 0).y.tolist() == [2]
    data.adopt({**data.spec, "classes": ["z", "a"]})
    with pytest.raises(InputError, match=r"classes of test that the model does not know: b"):
        data.batches("test", 0, 1)
    for columns, words in (
        (["x"], "x"),
        ([f"c{i}" for i in range(321)], "c0, .*, c9 and 311 more"),
        (None, "none"),
    ):
        with pytest.raises(InputError, match=f"columns must be the model's: {words}; got co2$"):
            SeriesData("co2", missing="interpolate").adopt({"columns": columns})
