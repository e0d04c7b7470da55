"""The header page: what the library refuses is refused, what we write the library reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from dsqjob.checkpoint.header import DTYPE_BITS, TensorSpec, encode, nbytes_of, read_header
from dsqjob.errors import DataError
from tests.checkpoint.hostile import CASES, GOOD, shard


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_shard_is_refused_by_its_own_id(tmp_path: Path, case: str) -> None:
    data, cause, name = CASES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_header(path)
    assert (caught.value.id, caught.value.exit_code) == (cause, 65)
    assert caught.value.where.startswith(str(path)) and name in caught.value.what + caught.value.where
    assert caught.value.way_out


def refused_by_library(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except (SafetensorError, OSError, ValueError):
        return True
    return False


def refused_by_us(path: Path) -> bool:
    try:
        read_header(path)
    except DataError:
        return True
    return False


MUTATIONS = st.one_of(
    st.tuples(st.just("offset"), st.sampled_from(["a", "b"]), st.integers(0, 1), st.integers(-2, 12)),
    st.tuples(st.just("shape"), st.sampled_from(["a", "b"]), st.just(0), st.integers(-2, 12)),
    st.tuples(st.just("dtype"), st.sampled_from(["a", "b"]), st.just(0), st.sampled_from([*DTYPE_BITS, "X", "u8"])),
    st.tuples(st.just("body"), st.just(""), st.just(0), st.integers(0, 12)),
    st.tuples(st.just("length"), st.just(""), st.just(0), st.integers(-3, 12)),
    st.tuples(st.just("byte"), st.just(""), st.integers(0, 90), st.integers(32, 126)),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MUTATIONS, min_size=0, max_size=2))
def test_whatever_the_library_refuses_is_refused(tmp_path: Path, mutations: list[tuple]) -> None:
    table, body, length, edits = json.loads(json.dumps(GOOD)), 8, 0, []
    for kind, name, index, value in mutations:
        if kind == "offset":
            table[name]["data_offsets"][index] = value
        elif kind == "shape":
            table[name]["shape"][0] = value
        elif kind == "dtype":
            table[name]["dtype"] = value
        elif kind == "body":
            body = value
        elif kind == "length":
            length = value
        else:
            edits.append((index, value))
    text = bytearray(json.dumps(table).encode())
    for index, value in edits:
        text[index % len(text)] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(shard(None, body, text=bytes(text), length=max(0, len(text) + length)))
    if refused_by_library(path):
        assert refused_by_us(path)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
       st.one_of(st.none(), st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)))  # fmt: skip
def test_the_library_reads_what_we_encode(
    tensors: list[tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    specs = [
        TensorSpec(f"t{n}", dtype, (*shape, 4) if DTYPE_BITS[dtype] < 8 else tuple(shape))
        for n, (dtype, shape) in enumerate(tensors)
    ]
    specs.sort(key=lambda spec: -DTYPE_BITS[spec.dtype])
    total = sum(nbytes_of(spec.dtype, spec.shape) for spec in specs)
    data = encode(specs, metadata) + bytes(total)
    assert int.from_bytes(data[:8], "little") % 8 == 0
    read = dict(deserialize(data))
    assert {name: (item["dtype"], tuple(item["shape"])) for name, item in read.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in specs
    }


def test_a_header_reads_back(tmp_path: Path) -> None:
    specs = [TensorSpec("w", "F32", (2, 3)), TensorSpec("s", "F8_E8M0", (5,)), TensorSpec("é", "U8", ())]
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(specs, {"format": "pt"}) + bytes(30))
    header = read_header(path)
    assert [TensorSpec(*entry[:3]) for entry in header.tensors.values()] == specs
    assert header.metadata == {"format": "pt"} and header.offset("s") == header.data_start + 24


def test_unaligned_and_doubled_tensors_are_not_encoded() -> None:
    with pytest.raises(ValueError, match="unaligned"):
        encode([TensorSpec("a", "U8", (3,)), TensorSpec("b", "F32", (1,))])
    with pytest.raises(ValueError, match="twice"):
        encode([TensorSpec("a", "U8", (3,)), TensorSpec("a", "U8", (1,))])
