from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from neurosig.export import main as export
from neurosig.exported import Exported, join_gold
from neurosig.hallucination import context_scores
from neurosig.hallucination.locate import FittedProbe, read_neurons
from neurosig.hallucination.probe import contribution_matrix
from neurosig.hallucination.scores import SCORES
from neurosig.manifest import read_manifest
from neurosig.patterns.clusters import ClusterConfig, pattern_clusters
from neurosig.report.__main__ import ReportConfig, main
from neurosig.report.data import NEURON_LEVEL, _signals, layer_profile, rollout_level
from neurosig.report.patterns import patterns
from neurosig.runtime.cli import run_command, visible
from neurosig.runtime.errors import UserError
from tests.support.exports import BIDI, K, N, write_lines, write_world
from tests.support.flow import export_config, file_bytes, make_manifest
from tests.support.parsers import UNCUT
from tests.support.paths import ROOT

VOID = {"meta", "br", "hr", "img", "input", "link"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of `write_world`, half of it selected."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    config = export_config(
        folder,
        folder / "model",
        folder / "questions.jsonl",
        rollouts=folder / "rollouts.jsonl",
        num_generations=K,
        question_filter="neuron",
    )
    export(config)
    return folder / "manifest"


def report(run: Path, out: Path, **changes: Any) -> Path:
    main(ReportConfig(manifest=run, out=out, resamples=300, quiet=True, **changes))
    return out


@pytest.fixture(scope="module")
def reported(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report of `world` and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        out = report(world, tmp_path_factory.mktemp("reported") / "report", examples=N)
    return out, printed.getvalue()


def table(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "signals.csv").open(newline="") as handle:
        return {(row["level"], row["signal"]): row for row in csv.DictReader(handle)}


class Page(HTMLParser):
    """Parses a page strictly: every tag is closed in order; what could load something is collected."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            (name, value)
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action", "style") or name.startswith("on")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert self.open.pop() == tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_says_what_the_signals_are_worth(world: Path, reported: tuple[Path, str]) -> None:
    out, printed = reported
    written = ["folds.csv", "layers.csv", "located_neurons.csv", "path.csv", "probe.safetensors", "report.html"]
    written.append("signals.csv")
    assert sorted(path.name for path in out.iterdir()) == written
    rows, manifest = table(out), read_manifest(world)
    gold = {f"q{index:02d}": f"gold{index}" for index in range(N)}

    right = [row.pseudo_label == gold[row.question_id] for row in manifest.rows]
    for name in manifest.rows[0].scores:
        line = rows["question", name]
        expected = roc_auc_score(right, [-row.scores[name] for row in manifest.rows])
        assert float(line["auroc"]) == pytest.approx(expected, abs=1e-6)
        assert float(line["auroc_low"]) <= expected <= float(line["auroc_high"])
        assert (line["questions"], line["right"]) == (str(N), str(sum(right)))

    share = [row.answers.count(answer) / K for row in manifest.rows for answer in row.answers]
    each = [answer == gold[row.question_id] for row in manifest.rows for answer in row.answers]
    assert float(rows["rollout", "vote_share"]["auroc"]) == pytest.approx(roc_auc_score(each, share), abs=1e-6)
    probe = load_file(world / "signals.safetensors")["probe_scores"]
    assert float(rows["rollout", "probe_score"]["auroc"]) == pytest.approx(roc_auc_score(each, -probe), abs=1e-6)
    assert rows["rollout", "vote_share"]["kind"] == "output" and rows["rollout", "probe_score"]["kind"] == "neuron"
    assert ("rollout", "mean_logprob") not in rows  # rollouts made elsewhere carry none
    assert rows["question", "vote_share"]["over_vote"] == "" and rows["question", "vote_share"]["over_outputs"] != ""
    assert float(rows["question", "random"]["over_vote_p_holm"]) >= float(rows["question", "random"]["over_vote_p"])
    assert all(row["verdict"] for row in rows.values())
    refitted = {key: row["over_vote_p_refit"] for key, row in rows.items() if row["over_vote_p_refit"]}
    assert set(refitted) == {("question", "probe_score"), ("rollout", "probe_score")}  # only what was fitted
    assert all(
        0 < 50 * float(p) <= 50 and 50 * float(p) == pytest.approx(round(50 * float(p))) for p in refitted.values()
    )

    page = Page((out / "report.html").read_text())
    for row in rows.values():
        assert row["verdict"] in page.text
    assert f"{N} questions, {sum(right)} majorities right." in page.text
    assert "ECE 0." in page.text
    assert "The best predictor of whether the majority is right:" in printed and "report.html" in printed


def test_hostile_text_is_shown_and_does_nothing(reported: tuple[Path, str]) -> None:
    raw = (reported[0] / "report.html").read_text()
    page = Page(raw)
    assert page.tags.isdisjoint({"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"})
    assert page.links == [] and "url(" not in raw and "@import" not in raw
    assert "default-src 'none'" in raw
    for sign in (*BIDI[0], *BIDI[-1], "\x1b", "\u200b"):
        assert sign not in raw
    assert r'<img src="http://evil.test/x.png" onerror="alert(1)"> \u202egpj.exe\u2069 nice?' in page.text
    assert "<script src=https://evil.test/a.js>alert(2)</script>\n" in page.text  # the line break stays
    assert r"\x1b[31mred\x1b[0m &amp; {{ 7 * 7 }}\u200b Answer: " in page.text


def test_visible_keeps_text_and_shows_what_hides() -> None:
    assert visible("naïve 東京 \n שלום 👩‍🚀") == "naïve 東京 \n שלום 👩‍🚀"
    assert visible("a\u200fb\u061cc\r\t\x7f\ufeff\ue000") == r"a\u200fb\u061cc\r\t\x7f\ufeff\ue000"


def test_the_same_manifest_gives_the_same_report(world: Path, tmp_path: Path) -> None:
    """In a process of its own too, which needs neither transformers nor nnsight."""
    first = file_bytes(report(world, tmp_path / "first", permutations=2, examples=N))
    code = f"""
import sys
from pathlib import Path
from neurosig.report.__main__ import ReportConfig, main
early = [name for name in ("numpy", "jinja2", "sklearn") if name in sys.modules]
run, out = Path({str(world)!r}), Path({str(tmp_path / "again")!r})
main(ReportConfig(manifest=run, out=out, resamples=300, permutations=2, examples={N}, quiet=True))
print(early, [name for name in ("transformers", "nnsight", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] []"
    assert file_bytes(tmp_path / "again") == first
    other = file_bytes(report(world, tmp_path / "other", seed=1, permutations=2))
    assert other["signals.csv"] != first["signals.csv"]


def test_without_gold_the_rest_is_reported_and_the_reason_given(world: Path, tmp_path: Path) -> None:
    bare = [json.loads(line) for line in (world.parent / "questions.jsonl").read_text().splitlines()]
    path = write_lines(tmp_path / "bare.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in bare])
    out = report(world, tmp_path / "report", questions=(str(path),))
    rows = table(out)
    assert all(row["auroc"] == row["over_vote"] == row["right"] == "" for row in rows.values())
    assert float(rows["question", "length"]["spearman_length"]) < -0.5
    text = Page((out / "report.html").read_text()).text
    assert f"No gold answers, so only the correlations: of {N} questions {N} there without an answer" in text
    assert "right" not in {row["verdict"] for row in rows.values()}


def test_gold_is_joined_by_id_and_text(world: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (world.parent / "questions.jsonl").read_text().splitlines()]
    records[3]["question"] = "Is another text nice?"
    path = write_lines(tmp_path / "changed.jsonl", records[:30])
    manifest = read_manifest(world)
    gold, reason = join_gold(manifest, [str(path)])
    assert set(gold) == {f"q{index:02d}" for index in range(30) if index != 3}
    assert reason == (
        f'of {N} questions 1 there with another text (the first is "q03" on line 4), 10 not in the question files '
        f'(the first is "q30") ({path})'
    )
    level = rollout_level(Exported(world), gold)
    assert len(level.owners) == 29 * K and level.owners.max() == 28
    trust = {signal.name: signal.trust for signal in level.signals}
    probe = load_file(world / "signals.safetensors")["probe_scores"].reshape(N, K)
    kept = [index for index in range(30) if index != 3]
    np.testing.assert_allclose(trust["probe_score"], -probe[kept].ravel())

    gone, reason = join_gold(manifest, [str(tmp_path / "none.jsonl")])
    assert gone == {} and reason is not None and "no such file" in reason and "--questions" in reason
    with pytest.raises(UserError, match="no such file"):
        join_gold(manifest, [str(tmp_path / "none.jsonl")], required=True)


def test_only_scores_of_neurons_count_as_neuron_signals() -> None:
    """A function of the user's may read anything, and the teacher's scores its answers."""
    names = (*SCORES, "my_scores:wavering", "token_overlap")
    found = {signal.name: signal.kind for signal in _signals({name: np.zeros(3) for name in names})}
    assert {name for name, kind in found.items() if kind == "neuron"} == NEURON_LEVEL
    others = {"my_scores:wavering", *context_scores.SCORES} - NEURON_LEVEL
    assert {name for name, kind in found.items() if kind == "other"} == others
    assert {name for name, kind in found.items() if kind == "control"} == {"random"}


def test_one_class_is_reported_and_does_no_harm(tmp_path: Path) -> None:
    """A random model is never right; and with its own answers as gold it always is."""
    run = make_manifest(tmp_path, answer_parser=UNCUT)
    text = Page((report(run, tmp_path / "wrong") / "report.html").read_text()).text
    assert "0 majorities right. All majorities are wrong, so no signal can tell right from wrong: no AUROC." in text
    rows = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    records = [
        {"id": row["question_id"], "domain": row["domain"], "question": row["question"], "answer": row["pseudo_label"]}
        for row in rows
        if row["pseudo_label"]
    ]
    assert len(records) >= 2
    path = write_lines(tmp_path / "own.jsonl", records)
    text = Page((report(run, tmp_path / "right", questions=(str(path),)) / "report.html").read_text()).text
    assert f"{len(records)} questions, {len(records)} majorities right. All majorities are right" in text
    assert "Single neurons cannot be located: of 8 questions, the rollouts of" in text
    assert not (tmp_path / "right" / "located_neurons.csv").exists()


def test_the_layer_profile_by_hand(world: Path) -> None:
    exported = Exported(world)
    manifest, neurons, d_mlp = exported.manifest, exported.neurons.to_dict("records"), exported.signals.d_mlp
    layers = layer_profile(exported)
    stored = load_file(world / "signals.safetensors")
    for layer in layers:
        weights = [neuron["weight"] for neuron in neurons if neuron["layer"] == layer.layer]
        assert (layer.to_hallucination, layer.to_trust) == (sum(w > 0 for w in weights), sum(w < 0 for w in weights))
        inside = (stored["neuron_ids"] >= 0) & (stored["neuron_ids"] // d_mlp == layer.layer)
        assert layer.contribution == pytest.approx(stored["contributions"][inside].astype(np.float64).mean(), rel=1e-5)
    per_question = [
        stored["contributions"][K * i : K * i + K][(stored["neuron_ids"][K * i : K * i + K] // d_mlp) == 1].mean(
            dtype=float
        )
        for i in range(N)
    ]
    shares = np.array([row.vote.count / K for row in manifest.rows if row.vote])
    split, agree = (np.array(per_question)[mask] for mask in (shares < 0.5, shares >= 0.75))
    pooled = np.sqrt(
        ((len(split) - 1) * split.var(ddof=1) + (len(agree) - 1) * agree.var(ddof=1)) / (len(split) + len(agree) - 2)
    )
    assert layers[1].difference == pytest.approx((split.mean() - agree.mean()) / pooled, rel=1e-4)


@pytest.mark.parametrize("place", ["nowhere", "not a manifest", "the folder above"])
def test_a_wrong_folder_is_one_sentence(
    world: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"nowhere": tmp_path / "nowhere", "not a manifest": tmp_path, "the folder above": world.parent}[place]
    code = run_command(ReportConfig, main, presets={}, prog="report", argv=["--manifest", str(run), "--quiet"])
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.startswith("error: ") and "\n" not in error
    expected = {
        "nowhere": "no such folder",
        "not a manifest": "incomplete export",
        "the folder above": "not a manifest folder; its subfolder manifest is one",
    }
    assert expected[place] in error


def test_the_located_neurons_are_those_of_the_saved_probe(world: Path, reported: tuple[Path, str]) -> None:
    """The page's sentence, the CSV and the saved probe agree, and the probe scores the run's own rollouts as fitted."""
    out, _ = reported
    probe, neurons = FittedProbe.load(out / "probe.safetensors"), read_neurons(out / "located_neurons.csv")
    pd.testing.assert_frame_equal(neurons, probe.neurons, check_exact=True)
    signals = Exported(world).signals
    scores = probe.score(
        contribution_matrix(signals.neuron_ids.numpy(), signals.contributions.float().numpy(), signals.n_neurons)
    )
    assert scores.shape == signals.probe_scores.shape and np.corrcoef(scores, signals.probe_scores)[0, 1] > 0.5
    text = Page((out / "report.html").read_text()).text
    assert f"Cross-validation by question keeps {len(probe.columns)} neurons" in text
    assert f"AUROC {probe.auroc:.3f} where they did not see it" in text
    assert f"at most {probe.stability.expected_false:.2f} false ones are expected" in text
    share = {row.question_id: row.vote.count / row.vote.n for row in read_manifest(world).rows}  # type: ignore[union-attr]
    known, guessed = (sum(test(value) for value in share.values()) for test in (lambda v: v >= 0.75, lambda v: v < 0.5))
    assert f"{known} questions whose rollouts agree, {guessed} whose rollouts split" in text


def test_reasoning_patterns_are_clusters_of_the_representatives(world: Path, reported: tuple[Path, str]) -> None:
    exported = Exported(world)
    manifest, signals = exported.manifest, exported.signals
    found = patterns(exported, seed=0)
    assert not isinstance(found, str)
    answered = [row for row in manifest.rows if row.pseudo_label is not None]
    assert found.n == len(answered) == sum(cluster.size for cluster in found.clusters)
    keys = list(manifest.rollouts)
    chosen = []
    for row in answered:
        scores = {
            index: float(signals.probe_scores[keys.index((row.question_id, index))])
            for index, answer in enumerate(row.answers)
            if answer == row.pseudo_label
        }
        chosen.append(keys.index((row.question_id, min(scores, key=lambda index: (scores[index], index)))))
    expected = pattern_clusters(signals.neuron_ids[chosen], signals.d_mlp, ClusterConfig(seed=0))
    assert np.array_equal(found.found.clustering.labels, expected.clustering.labels)
    assert {row["clustering"] for row in found.comparison} == {"neurons", "hidden states", "tokens"}
    text = Page((reported[0] / "report.html").read_text()).text
    assert found.sentence in text
    assert found.clusters[0].typical[0] in {row.question for row in answered}
