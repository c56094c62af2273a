"""The runs that the notebooks look at: a finished one if there is one, else a small one made on the spot.

``NEUROSIG_RUN`` names a folder as ``make demo`` writes it, as seen from the working directory or from the repository's
root. Without it the notebooks use ``runs/demo`` if it holds an
export, else they make ``runs/small``: the same commands on fewer questions, two minutes on two CPU cores. They write
what they add to a run (another selection) to its subfolder ``notebooks``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from neurosig.manifest import HEADER, Manifest, read_manifest
from neurosig.runtime.errors import UserError
from neurosig.runtime.shapes import check_choice

VARIABLE = "NEUROSIG_RUN"
REPOSITORY = Path(__file__).resolve().parents[2]
Part = Literal["export", "adapter", "evaluations"]

SMALL_EXPORT: Mapping[str, Any] = {"limit": 32, "num_generations": 4, "probe_folds": 3, "probe_inverse_penalty": 1.0}
SMALL_TRAIN: Mapping[str, Any] = {"steps": 3, "questions_per_step": 4, "warmup_steps": 1}
SMALL_EVALUATION: Mapping[str, Any] = {
    "questions": ("world-facts", "language"),
    "limit": (12, 8),
    "num_generations": 4,
}
ORGANISM_EXPORT: Mapping[str, Any] = {"limit": 48, "num_generations": 4, "probe_folds": 2}


def run_folder(*parts: Part) -> Path:
    """Folder of a run of the embedded model, with a ``manifest``, for ``adapter`` with the adapter trained on it
    (``nopsd/adapter``), and for ``evaluations`` with ``eval`` folders.

    Raises:
        UserError: ``NEUROSIG_RUN`` names a folder without a finished export or without what else is asked for.
    """
    for part in parts:
        check_choice("part", part, Part)
    wanted: Sequence[Part] = ("export", *parts)
    named = os.environ.get(VARIABLE)
    if named is None or not named.strip():
        demo = _root() / "runs" / "demo"
        return demo if all(_holds(demo, part) for part in wanted) else small_run(_root() / "runs" / "small", *parts)
    places = list(dict.fromkeys((base / Path(named).expanduser()).resolve() for base in (Path.cwd(), REPOSITORY)))
    for place in places:
        if all(_holds(place, part) for part in wanted):
            return place
    lacking = next(part for part in wanted if not any(_holds(place, part) for place in places))
    raise UserError(
        f"{VARIABLE}={named}: no finished {lacking} in {' or '.join(map(str, places))}; "
        "name a folder that make demo wrote"
    )


def small_run(folder: Path, *parts: Part) -> Path:
    """Make a small run in ``folder``, saying so and with a bar; finished parts are kept."""
    from tqdm.auto import tqdm

    evaluated = "evaluations" in parts
    trained = evaluated or "adapter" in parts
    if all(_holds(folder, part) for part in ("export", *parts)) and (not evaluated or _evaluated(folder, "nopsd")):
        return folder
    minutes = "two minutes" if evaluated else "a minute"
    print(f"No finished run here yet: a small one is made once, in {folder} (about {minutes} on two CPU cores).")
    bar = tqdm(total=5 if evaluated else 2 if trained else 1, desc="small run")
    _export(folder / "manifest", {"model": "smollm2-135m", "questions": ("world-facts",), **SMALL_EXPORT})
    bar.update()
    if trained:
        from distill.config import TrainConfig
        from distill.train import main as train

        train(TrainConfig(manifest=folder / "manifest", out=folder / "nopsd", resume=True, quiet=True, **SMALL_TRAIN))
        bar.update()
    if evaluated:
        from distill.evaluate import EvaluateConfig
        from distill.evaluate import main as evaluate

        variants: Mapping[str, Mapping[str, Any]] = {
            "base": {},
            "control": {"temperature": 0.1},
            "nopsd": {"adapter": folder / "nopsd" / "adapter"},
        }
        for name, options in variants.items():
            settings: dict[str, Any] = {**SMALL_EVALUATION, **options}
            evaluate(
                EvaluateConfig(model="smollm2-135m", out=folder / "eval" / name, resume=True, quiet=True, **settings)
            )
            bar.update()
    bar.close()
    return folder


def organism_folder() -> Path:
    """Folder of a small run of the model organism, whose procedures are known, with a ``manifest``."""
    from neurosig.export import PRESETS

    folder = _root() / "runs" / "small-organism"
    _export(folder / "manifest", {**PRESETS["organism"], **ORGANISM_EXPORT})
    return folder


def another_selection(run: Path, **options: Any) -> Manifest:
    """Select again from the run's rollouts and traces under other options, such as ``context_policy="random"``."""
    return select_again(run / "manifest", run / "notebooks", **options)


def select_again(manifest: Path, into: Path, **options: Any) -> Manifest:
    """Select again from a finished export's rollouts and traces.

    Args:
        manifest: Folder of the finished export.
        into: Parent folder of the new selection, which is named after its options.
        options: Options of `neurosig.export` that differ from the finished export.
    """
    from neurosig.export import ExportConfig
    from neurosig.export import main as export

    header = read_manifest(manifest).header
    words = {name: "+".join(value) if isinstance(value, tuple) else value for name, value in options.items()}
    label = "-".join(f"{name}-{value}" for name, value in sorted(words.items()))
    out = into / f"{label}-{header.content_sha256[:8]}"
    known = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in header.options.items()
        if name in ExportConfig.__dataclass_fields__
    }
    settings: dict[str, Any] = known | options
    settings |= {"quiet": True, "resume": True, "out": out, "reuse": manifest}
    if settings["rollouts"] is not None:
        settings["rollouts"] = Path(settings["rollouts"])
    out.parent.mkdir(parents=True, exist_ok=True)
    export(ExportConfig(**settings))
    return read_manifest(out)


def _root() -> Path:
    """Parent of ``runs``: the working directory, or its parent if that is ``notebooks``."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def _holds(run: Path, part: Part) -> bool:
    files = {"export": f"manifest/{HEADER}", "adapter": "nopsd/adapter/adapter_config.json"}
    return _evaluated(run, "base") if part == "evaluations" else (run / files[part]).is_file()


def _evaluated(run: Path, method: str) -> bool:
    return (run / "eval" / method / "summary.json").is_file()


def _export(out: Path, options: Mapping[str, Any]) -> None:
    from neurosig.export import ExportConfig
    from neurosig.export import main as export

    out.parent.mkdir(parents=True, exist_ok=True)
    export(ExportConfig(**{**options, "out": out, "resume": True, "quiet": True}))
