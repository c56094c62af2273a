"""The signal search end to end on tiny manifests: every variant judged, on questions that none was fitted on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from figures.experiments.signal_search import VARIANTS, SearchConfig, draw, main
from neurosig.export import main as export
from neurosig.runtime.errors import UserError
from tests.support.exports import K, N, write_world
from tests.support.flow import export_config, save_tiny


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two manifests of one tiny model, over different questions."""
    folders = []
    for first in (0, N):
        folder = write_world(tmp_path_factory.mktemp("world"), first)
        save_tiny(folder / "model", "gemma3")  # three layers: one for each band
        files = {"rollouts": folder / "rollouts.jsonl", "num_generations": K}
        export(export_config(folder, folder / "model", folder / "questions.jsonl", **files))
        folders.append(folder / "manifest")
    return folders


def test_every_variant_is_judged_on_unseen_questions(
    manifests: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = manifests
    main(SearchConfig(train=train, held_out=(held_out,), out=tmp_path, resamples=100, permutations=2, quiet=True))
    table = pd.read_csv(tmp_path / "signal_search.csv")
    for event in ("majority is right", "rollout is right"):
        judged = table[table["event"] == event].set_index("variant")
        assert {variant.name for variant in VARIANTS} <= set(judged.index)
        assert (judged["n"] == N).all()
        assert judged.loc["vote share", "auroc"] > 0.7  # known by construction, and read from the answers alone
    tried = table[table["role"] == "tried"]
    assert (tried["over_vote_p_holm"] >= tried["over_vote_p"]).all()
    assert len(tried) == 2 * sum(variant.role == "tried" for variant in VARIANTS)
    p_refit = table.loc[table["role"] != "output", ["over_vote_p_refit", "over_outputs_p_refit"]].to_numpy()
    assert set(np.round(3 * p_refit.ravel(), 3)) <= {1, 2, 3}  # (1 + those that gain as much) / (1 + 2)
    assert table.loc[table["role"] == "output", "over_vote_p_refit"].isna().all()
    printed = capsys.readouterr().out
    assert f"Of {len(tried)} tests" in printed and "0 add to the vote share" in printed  # 2 refits prove nothing
    before = (tmp_path / "signal_search.csv").read_bytes()
    main(SearchConfig(train=train, held_out=(held_out,), out=tmp_path, resamples=100, permutations=2, quiet=True))
    assert (tmp_path / "signal_search.csv").read_bytes() == before
    assert {path.name for path in draw(tmp_path, tmp_path / "out")} == {
        "signal_search.csv",
        "signal_search.pdf",
        "signal_search.png",
    }


def test_questions_of_the_training_manifest_are_refused(manifests: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--held-out .*manifest: shares questions with --train"):
        main(SearchConfig(train=manifests[0], held_out=(manifests[0],), out=tmp_path, quiet=True))
