"""One damaged checkpoint for each condition of the servers, and what each server will do with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsqjob.checkpoint.release import INDEX, open_release
from dsqjob.verify.report import markdown, write_report
from dsqjob.verify.servers import SERVERS
from tests.harness import Tensor, read_checkpoint
from tests.verify.pairs import Pair, Shard, edit_json, edit_shard, index_again, sums_again, verify

EXPERT = "layers.1.ffn.experts.3"
W1 = f"{EXPERT}.w1"
LOADS, FAILS, WRONG = "loads", "fails", "silently wrong"


def shard_edit(edit: Callable[[Shard], object], *, index: bool = True) -> Callable[[Pair], None]:
    def damage(pair: Pair) -> None:
        home = open_release(pair.release).index[f"{W1}.weight"]
        edit_shard(pair.checkpoint / home, edit)
        if index:
            index_again(pair.checkpoint)

    return damage


def field(name: str, **fields: object) -> Callable[[Pair], None]:
    return shard_edit(lambda shard: shard.update({name: shard[name]._replace(**fields)}))


def times(factor: float, *names: str) -> Callable[[Pair], None]:
    def edit(shard: Shard) -> None:
        for name in names:
            value = np.frombuffer(shard[name].data, "<f4") * np.float32(factor)
            shard[name] = shard[name]._replace(data=value.astype("<f4").tobytes())

    return shard_edit(edit)


def config(edit: Callable[[Any], object]) -> Callable[[Pair], None]:
    return lambda pair: edit_json(pair.checkpoint / "config.json", edit)


def inline(**fields: object) -> Callable[[Pair], None]:
    return config(lambda value: value["quantization_config"].update(fields))


def hf(edit: Callable[[Any], object]) -> Callable[[Pair], None]:
    return lambda pair: edit_json(pair.checkpoint / "hf_quant_config.json", edit)


def both_ignore(pattern: str) -> Callable[[Pair], None]:
    def damage(pair: Pair) -> None:
        config(lambda value: value["quantization_config"]["ignore"].append(pattern))(pair)
        hf(lambda value: value["quantization"]["exclude_modules"].append(pattern))(pair)

    return damage


def first_scale(byte: int) -> Callable[[Pair], None]:
    name = f"{EXPERT}.w2.weight_scale"
    return shard_edit(
        lambda shard: shard.update({name: shard[name]._replace(data=bytes([byte]) + shard[name].data[1:])})
    )


def transposed(shard: Shard) -> None:
    name = f"{EXPERT}.w2.weight_scale"
    shard[name] = shard[name]._replace(shape=shard[name].shape[::-1])


CASES: list[tuple[str, str, Callable[[Pair], None], tuple[str, str, str]]] = [
    ("A1", "no input_scale", shard_edit(lambda s: s.pop(f"{W1}.input_scale")), (WRONG, WRONG, FAILS)),
    ("A1", "no expert", shard_edit(lambda s: [s.pop(n) for n in list(s) if n.startswith(f"{EXPERT}.")]),
     (WRONG, WRONG, FAILS)),
    ("A1", "a fifth tensor", shard_edit(lambda s: s.update({f"{W1}.bias": Tensor("U8", (1,), b"a")})),
     (WRONG, WRONG, FAILS)),
    ("A2", "a weight of another dtype", field(f"{W1}.weight", dtype="I8"), (WRONG, FAILS, FAILS)),
    ("A2", "scales of another shape", shard_edit(transposed), (FAILS, FAILS, FAILS)),
    ("A3", "scale left over", shard_edit(lambda s: s.update({f"{W1}.scale": Tensor("U8", (1,), b"a")})),
     (WRONG, LOADS, WRONG)),
    ("A4", "a scale that is NaN", first_scale(0x7F), (WRONG, WRONG, WRONG)),
    ("A4", "a scale with the sign bit", first_scale(0x81), (WRONG, WRONG, WRONG)),
    ("A4", "a zero scale over values", first_scale(0), (WRONG, WRONG, WRONG)),
    ("A4", "an infinite tensor scale", times(np.inf, f"{EXPERT}.w2.weight_scale_2"), (WRONG, WRONG, WRONG)),
    ("A4", "a negative input scale", times(-1, f"{EXPERT}.w2.input_scale"), (WRONG, WRONG, WRONG)),
    ("A5", "weight_scale_2 not shared", times(2, f"{W1}.weight_scale_2"), (WRONG, LOADS, FAILS)),
    ("A6", "input_scale not shared", times(2, f"{W1}.input_scale"), (WRONG, WRONG, FAILS)),
    ("A7", "an outlier", times(5000, f"{W1}.input_scale", f"{EXPERT}.w3.input_scale"), (LOADS, LOADS, LOADS)),
    ("B1", "model_type", config(lambda c: c.update(model_type="deepseek_v3")), (FAILS, FAILS, FAILS)),
    ("B1", "quant_method", inline(quant_method="modelopt"), (FAILS, FAILS, FAILS)),
    ("B1", "activation_scheme", config(lambda c: c["quantization_config"].pop("activation_scheme")),
     (FAILS, FAILS, FAILS)),
    ("B1", "weight_block_size", inline(weight_block_size=[64, 64]), (WRONG, FAILS, FAILS)),
    ("B1", "scale_fmt", inline(scale_fmt="float"), (WRONG, FAILS, FAILS)),
    ("B2", "moe_quant_algo", config(lambda c: c["quantization_config"].pop("moe_quant_algo")), (WRONG, WRONG, LOADS)),
    ("B2", "expert_dtype", config(lambda c: c.update(expert_dtype="fp8")), (FAILS, FAILS, LOADS)),
    ("B3", "quant_algo", inline(quant_algo="NVFP4"), (LOADS, FAILS, FAILS)),
    ("B3", "ignore", inline(ignore="head"), (LOADS, FAILS, FAILS)),
    ("B3", "group_size", inline(group_size=True), (LOADS, WRONG, FAILS)),
    ("B4", "no file", lambda pair: (pair.checkpoint / "hf_quant_config.json").unlink(), (LOADS, LOADS, FAILS)),
    ("B4", "producer", hf(lambda h: h["producer"].update(name="dsqjob")), (LOADS, LOADS, FAILS)),
    ("B4", "kv_cache_quant_algo", hf(lambda h: h["quantization"].update(kv_cache_quant_algo="FP8")),
     (LOADS, LOADS, FAILS)),
    ("B4", "exclusions", hf(lambda h: h["quantization"]["exclude_modules"].pop()), (LOADS, LOADS, LOADS)),
    ("B4", "layers", hf(lambda h: h["quantization"]["quantized_layers"].popitem()), (LOADS, LOADS, LOADS)),
    ("B5", "nested", inline(quantization={}), (FAILS, LOADS, LOADS)),
    ("B6", "a glob", both_ignore("*.ffn.*"), (LOADS, WRONG, LOADS)),
    ("B6", "a dotted part", both_ignore("experts"), (LOADS, WRONG, LOADS)),
    ("B6", "one layer", both_ignore("layers.1"), (LOADS, WRONG, LOADS)),
    ("B7", "overlay", lambda pair: (pair.checkpoint / "quant_cfg.json").write_text("{}") and None,
     (LOADS, LOADS, WRONG)),
    ("E1", "ghost", lambda pair: edit_json(pair.checkpoint / INDEX, lambda i: i["weight_map"].pop("norm.weight")),
     (LOADS, WRONG, LOADS)),
    ("E1", "total_size", lambda pair: edit_json(pair.checkpoint / INDEX, lambda i: i["metadata"].update(total_size=1)),
     (LOADS, WRONG, LOADS)),
]  # fmt: skip


@pytest.mark.parametrize(("id", "case", "damage", "outcomes"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_broken_condition_is_named_with_what_each_server_does(
    pairs: dict[str, Pair],
    tmp_path: Path,
    id: str,
    case: str,
    damage: Callable[[Pair], None],
    outcomes: tuple[str, ...],
) -> None:
    pair = pairs["requantize"].copy(tmp_path)
    damage(pair)
    sums_again(pair.checkpoint)
    verdicts = verify(pair).verdicts
    assert tuple(verdict.outcome for verdict in verdicts) == outcomes
    broken = {one.id for verdict in verdicts for one in verdict.broken}
    assert broken - {"E2"} in ({id}, {id, "B4"})


def test_a_good_checkpoint_loads_everywhere(pairs: dict[str, Pair]) -> None:
    for route in ("cast", "requantize"):
        report = verify(pairs[route], required=SERVERS)
        assert [verdict.outcome for verdict in report.verdicts] == [LOADS] * 3
        assert {one.id for verdict in report.verdicts for one in verdict.broken} <= {"E2"}
        assert report.passed


def test_sizes_only_warn_until_a_tensor_parallel_size_is_named(pairs: dict[str, Pair]) -> None:
    """The goldens' hidden size is 256: too small for a kernel's tile of 512."""
    severities = {
        tp: {
            one.severity
            for verdict in verify(pairs["cast"], tp=tp).verdicts
            for one in verdict.broken
            if one.id == "E2"
        }
        for tp in (None, 4)
    }
    assert severities == {None: {"W"}, 4: {"F"}}


def test_a_tensor_parallel_size_that_cuts_too_small_is_named(pairs: dict[str, Pair]) -> None:
    whats = [one.what for one in verify(pairs["cast"], tp=4).verdicts[0].broken if one.id == "E2"]
    assert any("moe_intermediate_size 128 over 4 ranks" in what for what in whats)
    assert any("shared expert" in what for what in whats)
    whole = [one.what for one in verify(pairs["cast"], tp=1).verdicts[0].broken if one.id == "E2"]
    assert not any("ranks" in what for what in whole)


def test_what_becomes_of_draft_layers_is_said_and_fails_nothing(pairs: dict[str, Pair], tmp_path: Path) -> None:
    drafts = {verdict.server: verdict.drafts for verdict in verify(pairs["cast"]).verdicts}
    assert drafts["sglang"].startswith("ok")
    assert drafts["vllm"].startswith("silent")
    assert drafts["trtllm"].startswith("broken")
    assert all("mtp.0: " in said and "I8" in said for said in drafts.values())
    pair = pairs["cast"].copy(tmp_path)
    last = pair.checkpoint / "model-00005-of-00005.safetensors"
    edit_shard(last, lambda shard: [shard.pop(name) for name in list(shard) if name.startswith("mtp.")])
    index_again(pair.checkpoint)
    report = verify(pair)
    assert {verdict.drafts for verdict in report.verdicts} == {"no draft layers"}
    assert [verdict.outcome for verdict in report.verdicts] == [LOADS] * 3


def test_the_oldest_fitting_servers_are_said(pairs: dict[str, Pair]) -> None:
    needs = {verdict.server: verdict.needs for verdict in verify(pairs["cast"]).verdicts}
    for server, pull_request in (("vllm", "42209"), ("sglang", "25820"), ("trtllm", "16433")):
        assert pull_request in needs[server]


def test_the_outlier_expert_is_named(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    times(5000, f"{EXPERT}.w2.input_scale")(pair)
    warned = [one for one in verify(pair).verdicts[0].broken if one.id == "A7"]
    assert [one.severity for one in warned] == ["W"]
    assert f"{EXPERT}.w2" in warned[0].what


def test_a_required_server_that_would_serve_it_wrongly_fails_the_verification(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    pair = pairs["cast"].copy(tmp_path)
    (pair.checkpoint / "quant_cfg.json").write_text("{}")
    sums_again(pair.checkpoint)
    assert verify(pair, alone=True, required=("vllm",)).passed
    assert not verify(pair, alone=True, required=("vllm", "trtllm")).passed


def test_without_the_release_a_missing_scale_still_fails(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    shard_edit(lambda shard: shard.pop(f"{W1}.input_scale"))(pair)
    sums_again(pair.checkpoint)
    report = verify(pair, alone=True)
    assert [(one.id, one.severity) for one in report.findings] == [("condition-A1", "fail")]


def test_both_reports_say_the_same(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["cast"].copy(tmp_path)
    (pair.checkpoint / "README.md").unlink()
    report = verify(pair, required=("vllm",))
    machine, page = write_report(report, tmp_path / "reports")
    said = json.loads(machine.read_bytes())
    assert said["passed"] is False
    assert [one["file"] for one in said["findings"]] == ["README.md", "SHA256SUMS"]
    assert said["tensors"] == len(read_checkpoint(pair.checkpoint))
    text = page.read_text()
    assert text == markdown(report)
    assert "FAILED" in text
    assert "`README.md`" in text
    assert all(f"## {server}: loads" in text for server in SERVERS)
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.json", "report.md"]
