"""The options of a run on record, with a hash of every input: which of them differ from those of another run."""

from __future__ import annotations

import json
import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from neurosig.runtime.cli import CommonConfig, config_record
from neurosig.runtime.errors import UserError
from neurosig.runtime.files import sha256_file, sha256_text, write_atomic
from neurosig.runtime.provenance import differences, explain, run_record
from neurosig.runtime.shapes import Shapes, option_names

logger = logging.getLogger(__name__)

RUN, BEGUN = "run.json", ".work.json"
"""Files of every output folder: `run_record` and the options that shape the results; these alone until it finishes."""
NOT_INPUTS = ("out", "adapter_dir", "config", "preset", "fields")
WRITTEN_LAST = ("manifest.json", "train.json")
"""A folder with one of these files, but for a model's, is compared by its hash alone."""
FREE = ("temperature", "seed", "adapter")
"""What evaluations that are compared may differ in."""
BY_CONTENT = ("model", "dtype", "questions", "fields", "split", "limit", "template")
"""Options that are compared by what they named, not by how."""
MODEL_MARKERS = ("config.json", "adapter_config.json")


def input_paths(config: CommonConfig) -> Iterator[tuple[str, Path]]:
    """Name of an option and every existing path in its value, of the options that may hold a path.

    These are options of type path or text; of ``NAME=QUESTIONS`` the second part counts.
    """
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        if field.name in NOT_INPUTS or not {str, Path} & {hint, *typing.get_args(hint)}:
            continue
        for one in value if isinstance(value, (tuple, list)) else (value,):
            for text in (str(one), str(one).partition("=")[2]) if one is not None else ():
                if text and len(text) < 4096 and "\0" not in text and _exists(Path(text)):
                    yield field.name, Path(text)
                    break


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except OSError:  # a sentence is no file name
        return False


def check_inputs_outside(config: CommonConfig, out: Path) -> None:
    """Refuse to overwrite a folder that holds an input.

    Raises:
        UserError: Naming the option and its path.
    """
    for name, path in input_paths(config):
        if path.expanduser().resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"--{name.replace('_', '-')} {path}: lies inside --out {out}, which --overwrite replaces; give another "
                "--out or move the input"
            )


def fingerprint(path: Path, *, without: Path | None = None) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files.

    Args:
        path: A manifest counts by its header, a training run by its record, a model's folder by the files directly in
            it, another by all files.
        without: An output folder, which may be inside ``path``.
    """
    path = path.expanduser()
    if path.is_file():
        return _hash(path)
    is_model = any((path / name).is_file() for name in MODEL_MARKERS)
    for name in WRITTEN_LAST:
        if (path / name).is_file() and not is_model:
            return _hash(path / name)
    files = (file for file in path.glob("*" if is_model else "**/*") if file.is_file() and file.suffix != ".md")
    left_out = None if without is None else without.resolve()
    parts = [
        f"{file.relative_to(path)}\0{_hash(file)}\n"
        for file in sorted(files)
        if left_out is None or not file.resolve().is_relative_to(left_out)
    ]
    return sha256_text("".join(parts))


def _hash(path: Path) -> str:
    state = path.stat()
    return _hash_once(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_once(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)


def options_record(config: CommonConfig) -> dict[str, Any]:
    """The options of a run as JSON values, without those that have no effect or no effect on the results.

    The value of an option that names existing paths is their list, each with ``path`` and ``sha256``; a function that
    is not ours has ``name`` and ``sha256``.
    """
    left_out = {*option_names(type(config), Shapes.PLACE), *config.without_effect()}
    record = {name: value for name, value in config_record(config).items() if name not in left_out}
    inputs: dict[str, dict[str, str]] = {}
    for name, path in input_paths(config):
        if name in record:
            out = getattr(config, "out", None)
            inputs.setdefault(name, {})[str(path)] = fingerprint(path, without=out)
    for name, hashes in inputs.items():
        value = record[name]
        listed = [_with_hash(text, hashes) for text in (value if isinstance(value, list) else [value])]
        record[name] = listed if isinstance(value, list) else listed[0]
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        for mark in getattr(hint, "__metadata__", ()):
            if name in record and hasattr(mark, "record"):  # a function, which its source's hash tells
                record[name] = mark.record(record[name])
    return record


def _with_hash(text: Any, hashes: Mapping[str, str]) -> Any:
    name, equals, place = str(text).partition("=")
    if str(Path(str(text))) in hashes:
        return {"path": str(text), "sha256": hashes[str(Path(str(text)))]}
    if equals and place and str(Path(place)) in hashes:
        return {"name": name, "path": place, "sha256": hashes[str(Path(place))]}
    return text


def begin_record(out: Path, options: Mapping[str, Any]) -> None:
    """Keep the options of a run that is not finished."""
    write_atomic(out / BEGUN, json.dumps({"options": options}, indent=1) + "\n")


def finish_record(out: Path) -> None:
    """Write ``run.json`` of a finished run: what made it, and with which options."""
    record = {**run_record(), "options": _recorded(out)}
    write_atomic(out / RUN, json.dumps(record, indent=1) + "\n")
    (out / BEGUN).unlink()


def is_longer(config: CommonConfig, finished: str) -> bool:
    """Whether ``config`` continues the run in its folder, with more of an option marked `Shapes.EXTENDS`.

    Raises:
        UserError: Another option differs, or there is no record of the options; every one is named with both values.
    """
    out: Path = config.out  # type: ignore[attr-defined]
    complete = (out / finished).exists()
    found = _recorded(out)
    if found is None:
        if complete:
            raise UserError(f"{out}: finished, but {RUN} does not name its options; use --overwrite or another --out")
        return False
    extends = option_names(type(config), Shapes.EXTENDS)
    if complete and extends:  # an extension that did not finish left the earlier result in place
        of_result = json.loads((out / finished).read_text(encoding="utf-8")).get("config", {})
        found |= {name: of_result[name] for name in extends if name in of_result}
    wanted = options_record(config)
    unfinished = () if complete else (Shapes.TRACES, Shapes.SELECTION)  # such work is made again, or has its own key
    resources, free = (option_names(type(config), *marks) for marks in ((Shapes.RESOURCES,), unfinished))
    changed = differences(found, wanted)
    longer = {name for name in extends if name in changed and found[name] < wanted[name]}
    forbidden = {name: pair for name, pair in changed.items() if name not in {*resources, *free, *longer}}
    if forbidden:
        fewer = [f"{name} can only grow" for name in extends if name in forbidden]
        raise UserError(
            f"{out}: cannot resume, these differ from the {'finished' if complete else 'interrupted'} run: "
            f"{explain(forbidden)}; " + "".join(f"{text}, " for text in fewer) + "use the same options or --overwrite"
        )
    if allowed := {name: pair for name, pair in changed.items() if name in resources}:
        logger.warning("%s: %s; memory and speed only, but bits of the results may differ", out, explain(allowed))
    return bool(longer)


def _recorded(out: Path) -> dict[str, Any] | None:
    path = out / (BEGUN if (out / BEGUN).exists() else RUN)
    try:
        return dict(json.loads(path.read_bytes())["options"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def check_inputs_unchanged(out: Path) -> None:
    """Refuse a finished folder whose inputs have changed since.

    Raises:
        UserError: Naming each option, with both hashes of its file or folder.
    """
    pairs: dict[str, tuple[Any, Any]] = {}
    for name, value in (_recorded(out) or {}).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping) and "sha256" in one and _exists(Path(one["path"])):
                now = {**one, "sha256": fingerprint(Path(one["path"]), without=out)}
                pairs |= {name: (one, now)} if one != now else {}
    if pairs:
        raise UserError(f"{out}: made from inputs that have changed since: {explain(pairs)}; give another --out")


def unlike(config_class: type, base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of everything but `FREE` in which two evaluations of the same questions differ.

    Args:
        config_class: Options of the evaluating command; those that shape model, rollouts or answers count.
        base: ``summary.json`` of one evaluation.
        other: Of the other.
    """
    names = option_names(config_class, Shapes.MODEL, Shapes.ROLLOUTS, Shapes.SELECTION)
    adapted = base["adapter_sha256"] != other["adapter_sha256"]  # a server gives every adapter a name of its own
    left_out = {*FREE, *BY_CONTENT, *(("served_model",) if adapted else ())}
    if base["config"]["scoring"] == "sampling":
        left_out |= {"choice_form"}
    records = []
    for summary in (base, other):
        model = summary["model"]
        weights = summary.get("trained_from") or model["weights"]
        records.append({name: summary["config"].get(name) for name in names if name not in left_out})
        records[-1] |= {
            "weights": {"path": model["id"], "sha256": sha256_text(json.dumps(sorted(weights.values())))},
            "dtype": model["dtype"],
            "tokenizer": model["tokenizer_sha256"],
            "template": model["chat_template_sha256"],
            "questions": summary["questions_sha256"],
            "parser": summary.get("answers", {}).get("parser_sha256"),
        }
    return differences(*records)


def check_alike(
    pairs: Mapping[str, tuple[Any, Any]], allowed: Sequence[str], where: str, labels: tuple[str, str]
) -> str:
    """The differences of `unlike` that are allowed, in words.

    Args:
        pairs: See `unlike`.
        allowed: Names that may differ.
        where: The other evaluation, for the message.
        labels: Names of the two evaluations.

    Raises:
        UserError: One is not allowed; every such is named with both values.
    """
    if wrong := {name: pair for name, pair in pairs.items() if name not in allowed}:
        raise UserError(
            f"{where}: cannot be compared, these differ: {explain(wrong, *labels)}; evaluate both alike, or give "
            f"--allow-difference {' '.join(wrong)}"
        )
    return explain(pairs, *labels)
