"""The tokens stage: from sources to rows, and every refusal."""

from __future__ import annotations

import codecs
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from dsqjob.engine.stage import Context, Done
from dsqjob.errors import DataError, DsqjobError, Interrupted, UsageError
from dsqjob.job.load import load
from dsqjob.stages.inputs import Inputs
from dsqjob.stages.tokens import SAMPLES, Tokens
from dsqjob.tokens.file import TOKENS, ids_digest, load_tokens
from dsqjob.tokens.samples import read_samples
from dsqjob.tokens.tokenizer import release_chat
from tests.harness import dsqjob, error_id, write_job
from tests.tokens.releases import BOS_BEFORE, TEMPLATE, light, lines, token_file

SHIPPED = Path(__file__).parent.parent.parent / "dsqjob" / "jobs" / "miniature-v4.jsonl"
TEXTS = ["The ship came home.", "fog", "Twelve loaves of rye, and a jar of 1234567 currants; then <|end|> of it."]


class Ticks(Context):
    token = "t0"  # noqa: S105
    chunk_bytes = 1 << 20

    def __init__(self, patience: int = 10**9) -> None:
        self.patience = patience
        self.total = 0

    def tick(self, nbytes: int) -> None:
        self.patience -= 1
        if self.patience < 0:
            raise Interrupted("interrupted", "asked to stop")
        self.total += nbytes


def stage(folder: Path, release: Path, data: list[dict[str, Any]], **settings: Any) -> Tokens:
    named = {f"tokens__{name}": value for name, value in settings.items()}
    shown = [{key: str(value) if isinstance(value, Path) else value for key, value in item.items()} for item in data]
    job = write_job(folder, release, tokens__data=shown, **named)
    made = Tokens(Inputs(load(str(job), environment={}, families=("deepseek-v4",), launchers=("local",))))
    made.folder.mkdir(parents=True, exist_ok=True)
    return made


def run(made: Tokens, context: Context | None = None) -> tuple[np.ndarray, dict[str, Any], Done]:
    made.check()
    done = made.do(made.units[0], context or Ticks())
    loaded = load_tokens(made.folder / TOKENS)
    papers = json.loads((made.folder / SAMPLES).read_text())
    assert loaded.digest == done.counts["digest"] == papers["digest"] == ids_digest(loaded.ids)
    assert loaded.ids.shape == (done.counts["n"], done.counts["s"]) == (papers["n"], papers["s"])
    return loaded.ids, papers, done


def encoded(release: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(release / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def refused(kind: type[DsqjobError], made: Any) -> DsqjobError:
    with pytest.raises(kind) as caught:
        run(made() if callable(made) else made)
    assert caught.value.way_out
    return caught.value


def test_rows_are_samples_in_order_cut_on_the_right_and_padded_with_eos(tmp_path: Path, miniature: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    ids, papers, _ = run(stage(tmp_path / "j", miniature, [{"jsonl": file}], sequence_length=20))
    whole = [encoded(miniature, text) for text in TEXTS]
    assert len(whole[2]) > 20 > len(whole[0])
    assert ids.tolist() == [(row + [1] * 20)[:20] for row in whole]
    assert papers["samples"] == [{"source": 0, "number": n + 1, "tokens": len(row)} for n, row in enumerate(whole)]


def test_rows_are_no_longer_than_the_longest_sample(tmp_path: Path, miniature: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "fog"}, {"text": "The ship came home."})
    ids, _, _ = run(stage(tmp_path / "j", miniature, [{"jsonl": file}]))
    assert ids.shape[1] == len(encoded(miniature, "The ship came home."))


def test_padding_side_pad_token_and_the_post_processors_bos_are_the_tokenizers(tmp_path: Path, miniature: Path) -> None:
    release = light(
        miniature, tmp_path / "r", post_processor=BOS_BEFORE, padding_side="left", pad_token={"content": "<|begin|>"}
    )
    file = lines(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    ids, _, _ = run(stage(tmp_path / "j", release, [{"jsonl": file}], sequence_length=20))
    whole = [[0, *encoded(release, text)][:20] for text in TEXTS]
    assert ids.tolist() == [[0] * (20 - len(row)) + row for row in whole]


def test_columns_are_tried_in_the_references_order(tmp_path: Path, miniature: Path) -> None:
    release = light(miniature, tmp_path / "r", chat_template=TEMPLATE)
    chat = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": " yes "}]
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]
    samples = {
        "<|begin|>User: hi\nassistant: yes<|end|>": {"conversations": chat, "prompt": "no", "messages": None},
        '<|begin|>assistant: <|end|>[{"function": {"name": "f", "arguments": {"a": 1}}}]T[{"x": "é<"}]': {
            "messages": call,
            "tools": [{"x": "é<"}],
        },
        "p\nc\nr\no": {"output": "o", "response": "r", "completion": "c", "prompt": "p", "text": "no"},
        "p": {"prompt": "p", "completion": None},
        "t": {"text": "t", "input": "no"},
        "i\no": {"input": "i", "output": "o"},
    }
    file = lines(tmp_path / "a.jsonl", *samples.values())
    found = [sample.text for sample in read_samples(file, None, release_chat(release))]
    assert found == list(samples)


def test_blank_lines_are_skipped_empty_texts_leave_no_row_and_counts_are_said(tmp_path: Path, miniature: Path) -> None:
    first = lines(
        tmp_path / "a.jsonl", "", {"text": "fog"}, "  ", {"text": ""}, {"text": "ship"}, {"text": "not taken"}
    )
    second = lines(tmp_path / "b.jsonl", {"text": "fog"})
    Path(second).write_bytes(codecs.BOM_UTF8 + Path(second).read_bytes())
    ids, papers, _ = run(
        stage(tmp_path / "j", miniature, [{"jsonl": first, "samples": 3}, {"jsonl": second, "samples": 5}])
    )
    assert len(ids) == 3
    assert [(one["source"], one["number"]) for one in papers["samples"]] == [(0, 2), (0, 5), (1, 1)]
    assert [(one["asked"], one["taken"], one["empty"]) for one in papers["sources"]] == [(3, 3, 1), (5, 1, 0)]


def test_packed_rows_are_full_and_say_which_samples_they_hold(tmp_path: Path, miniature: Path) -> None:
    release = light(miniature, tmp_path / "r", post_processor=BOS_BEFORE)
    file = lines(tmp_path / "a.jsonl", *({"text": text} for text in TEXTS))
    ids, papers, _ = run(stage(tmp_path / "j", release, [{"jsonl": file}], sequence_length=15, packing=True))
    pieces = [[*encoded(release, text), 1] for text in TEXTS]
    stream = [one for piece in pieces for one in piece]
    assert len(stream) % 15
    assert ids.ravel().tolist() == stream[: len(stream) // 15 * 15]
    owner = [n for n, piece in enumerate(pieces) for _ in piece]
    assert papers["rows"] == [sorted(set(owner[row * 15 : row * 15 + 15])) for row in range(len(ids))]


def test_token_files_are_widened_padded_and_stand_beside_texts(tmp_path: Path, miniature: Path) -> None:
    wide = token_file(tmp_path / "wide.safetensors", [[5, 6, 7, 8]])
    narrow = token_file(tmp_path / "narrow.safetensors", [[2, 3], [4, 511]], "I32")
    file = lines(tmp_path / "a.jsonl", {"text": "fog"})
    ids, papers, _ = run(stage(tmp_path / "j", miniature, [{"tokens": narrow}, {"jsonl": file}, {"tokens": wide}]))
    fog = encoded(miniature, "fog")
    assert ids.tolist() == [[2, 3, 1, 1], [4, 511, 1, 1], (fog + [1] * 4)[:4], [5, 6, 7, 8]]
    assert papers["samples"][1] == {"source": 0, "number": 2, "tokens": 2}


@pytest.mark.parametrize(
    ("line", "id"),
    [
        ("{", "jsonl-line"),
        ("[1]", "jsonl-line"),
        ('{"text": 7}', "jsonl-line"),
        ('{"text": "\\ud800"}', "jsonl-line"),
        ('{"messages": "hi"}', "jsonl-line"),
        ('{"body": "x"}', "jsonl-columns"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "chat-template-missing"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, miniature: Path, line: str, id: str) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
    error = refused(DsqjobError, stage(tmp_path / "j", miniature, [{"jsonl": file}]))
    assert (error.id, error.where) == (id, f"{file}:3")
    assert not (tmp_path / "j" / "work" / "tokens" / TOKENS).exists()


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ ''.__class__.mro() }}"])
def test_a_template_that_fails_is_named_with_the_line(tmp_path: Path, miniature: Path, template: str) -> None:
    release = light(miniature, tmp_path / "r")
    (release / "chat_template.jinja").write_text(template)
    file = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    error = refused(UsageError, stage(tmp_path / "j", release, [{"jsonl": file}]))
    assert (error.id, error.where) == ("chat-template-failed", f"{file}:1")


@pytest.mark.parametrize("row", [0, 1])
def test_an_id_outside_the_vocabulary_is_named_with_file_and_row(tmp_path: Path, miniature: Path, row: int) -> None:
    ids = [[1, 2], [3, 4]]
    ids[row][1] = [-1, 512][row]
    file = token_file(tmp_path / "a.safetensors", ids)
    error = refused(DataError, stage(tmp_path / "j", miniature, [{"tokens": file}]))
    assert (error.id, error.where) == ("token-id", f"{file}: row {row + 1}")
    assert str(ids[row][1]) in error.what and "512" in error.what


def test_token_files_of_another_form_are_refused(tmp_path: Path, miniature: Path) -> None:
    for n, (ids, dtype, name, cause) in enumerate(
        [
            ([[1.0]], "F32", "input_ids", "tokens-invalid"),
            ([1, 2], "I64", "input_ids", "tokens-invalid"),
            ([[1]], "I64", "ids", "tokens-invalid"),
            (np.zeros((0, 4)), "I64", "input_ids", "tokens-empty"),
        ]
    ):
        file = token_file(tmp_path / f"{n}.safetensors", ids, dtype, name)
        with pytest.raises(DataError) as caught:
            load_tokens(file)
        assert caught.value.id == cause
        assert refused(DataError, stage(tmp_path / f"j{n}", miniature, [{"tokens": file}])).id == cause
    with pytest.raises(DataError):
        load_tokens(token_file(tmp_path / "narrow.safetensors", [[1]], "I32"))


def test_settings_that_do_not_fit_are_refused_before_work(tmp_path: Path, miniature: Path) -> None:
    wide = token_file(tmp_path / "a.safetensors", [[1] * 9])
    file = lines(tmp_path / "a.jsonl", {"text": "fog"})
    empty = lines(tmp_path / "empty.jsonl")
    before = light(miniature, tmp_path / "r", post_processor=BOS_BEFORE)
    cases: list[tuple[str, Path, dict[str, Any], dict[str, Any]]] = [
        ("tokens-too-long", miniature, {"tokens": wide}, {"sequence_length": 8}),
        ("sequence-too-long", miniature, {"jsonl": file}, {"sequence_length": 1 << 30}),
        ("sequence-too-short", before, {"jsonl": file}, {"sequence_length": 1}),
        ("tokens-empty", miniature, {"jsonl": empty}, {}),
        ("tokens-empty", miniature, {"jsonl": file}, {"packing": True}),
        ("source-missing", miniature, {"jsonl": tmp_path / "nowhere"}, {}),
        ("output-inside-release", miniature, {"jsonl": file}, {"output": str(miniature / "tokens")}),
        ("job-invalid", miniature, {"tokens": wide}, {"packing": True}),
        ("job-invalid", miniature, {"dataset": "cnn_dailymail"}, {}),
    ]
    for n, (cause, release, source, settings) in enumerate(cases):
        folder = tmp_path / f"j{n}"
        assert refused(DsqjobError, lambda: stage(folder, release, [source], **settings)).id == cause  # noqa: B023


def test_a_tokenizer_that_is_missing_or_broken_is_refused(tmp_path: Path, miniature: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "fog"}, {"text": "a ship"})
    release = light(miniature, tmp_path / "r", pad_token="<|nowhere|>")  # noqa: S106
    assert refused(DataError, stage(tmp_path / "j", release, [{"jsonl": file}])).id == "tokenizer-invalid"
    (release / "tokenizer.json").write_text("{}")
    assert refused(DataError, stage(tmp_path / "j", release, [{"jsonl": file}])).id == "tokenizer-invalid"
    (release / "tokenizer.json").unlink()
    assert refused(DataError, stage(tmp_path / "j", release, [{"jsonl": file}])).id == "tokenizer-missing"


def test_the_fingerprint_names_what_changed_and_ignores_where_files_lie(tmp_path: Path, miniature: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "fog"})
    parts = stage(tmp_path / "j", miniature, [{"jsonl": file}]).fingerprint
    moved = Path(shutil.copyfile(file, tmp_path / "moved.jsonl"))
    assert stage(tmp_path / "k", miniature, [{"jsonl": moved}]).fingerprint.digest == parts.digest
    more = stage(tmp_path / "j", miniature, [{"jsonl": file, "samples": 1}]).fingerprint
    assert more.changes(parts.parts) == ["tokens.data[0]"]
    lines(file, {"text": "frog"})
    assert stage(tmp_path / "j", miniature, [{"jsonl": file}]).fingerprint.changes(parts.parts) == ["tokens.data[0]"]
    release = light(miniature, tmp_path / "r")
    other = stage(tmp_path / "j", release, [{"jsonl": moved}], sequence_length=7, packing=True).fingerprint
    assert other.changes(parts.parts) == ["tokenizer", "tokens.packing", "tokens.sequence_length"]


def test_progress_adds_up_and_a_request_to_stop_is_heard(tmp_path: Path, miniature: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *({"text": f"{n} ships in the fog"} for n in range(2000)))
    made = stage(tmp_path / "j", miniature, [{"jsonl": file}])
    ticks = Ticks()
    run(made, ticks)
    assert ticks.total == made.units[0].bytes_out
    assert ticks.patience < 10**9 - 5
    with pytest.raises(Interrupted):
        run(made, Ticks(3))


def test_the_stage_runs_from_the_command_line_without_torch_and_without_shards(
    tmp_path: Path, miniature: Path, base_python: Path
) -> None:
    job = write_job(tmp_path, light(miniature, tmp_path / "r"), tokens__data=[{"jsonl": str(SHIPPED), "samples": 30}])
    command = [str(base_python), "-m", "dsqjob", "run", str(job), "--stage", "tokens"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "24 samples, 30 were asked for" in done.stdout
    assert load_tokens(tmp_path / "work" / "tokens" / TOKENS).ids.shape[0] == 24
    assert "nothing to do" in dsqjob("run", job, "--stage", "tokens").stdout


def test_a_data_set_without_its_packages_names_them(tmp_path: Path, miniature: Path) -> None:
    job = write_job(tmp_path, miniature, tokens__data=[{"dataset": "cnn_dailymail", "samples": 1}])
    done = dsqjob("run", job, "--stage", "tokens", code=None)
    assert (done.returncode, error_id(done)) in [(64, "hub-packages"), (69, "hub-unreachable")]
    assert list((tmp_path / "work" / "tokens").glob("dataset-*")) == []


def test_samples_of_the_loader_are_tokenized_as_lines_are(tmp_path: Path, miniature: Path) -> None:
    """The loader also takes a local file: everything but the network is real."""
    _, papers, _ = run(stage(tmp_path / "j", miniature, [{"dataset": str(SHIPPED), "samples": 9}]))
    _, same, _ = run(stage(tmp_path / "k", miniature, [{"jsonl": SHIPPED, "samples": 9}]))
    assert papers["digest"] == same["digest"] and papers["n"] == 9
