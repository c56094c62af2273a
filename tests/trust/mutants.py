"""Deliberately wrong formulas: a test must catch each.

    python -m tests.trust.mutants

A mutant is one exact replacement in a file. It is made in a copy of the packages, on which the tests of that file are
run. Failures are a mutant that no test notices and one whose text is no longer in the file.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTICED = 1
"""pytest's exit code when tests failed; any other code but 0 means that they did not run."""


@dataclass(frozen=True)
class Mutant:
    """A replacement, and the tests that must fail: files and a ``-k`` expression that keeps them few."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    only: str = ""


LOSSES, STEP, HIDDEN = "distill/losses.py", "distill/step.py", "neurosig/models/completion_hidden.py"
NUMBERS, GRADING, VOTE, METRICS, STATISTICS, RESAMPLING = (
    "neurosig/questions/answers/numbers.py",
    "neurosig/questions/answers/grading.py",
    "neurosig/questions/vote.py",
    "neurosig/statistics/metrics.py",
    "neurosig/statistics/significance.py",
    "neurosig/statistics/resampling.py",
)
CONTRIBUTIONS, REDUCTION, SAMPLING = (
    "neurosig/neurons/contributions.py",
    "neurosig/neurons/reduction.py",
    "neurosig/sampling/next_token.py",
)
ROLLOUTS, BATCHING, TASKS, TEACHER = (
    "neurosig/sampling/rollouts.py",
    "neurosig/models/prefix.py",
    "distill/tasks.py",
    "distill/teacher.py",
)
DENSE = "value_and_gradient_equal_dense or two_entries"

MUTANTS = (
    # the divergence
    Mutant("forward KL the other way round", LOSSES, "Terms((log_t - log_s).mul_(t), s - t, 1)", "Terms((log_s - log_t).mul_(s), s - t, 1)", "distill/test_losses.py", DENSE),
    Mutant("teacher and student swapped", LOSSES, "log_s, log_t = _log_softmax(logits, options), _log_softmax(teacher_logits, options)", "log_t, log_s = _log_softmax(logits, options), _log_softmax(teacher_logits, options)", "distill/test_losses.py", DENSE),
    Mutant("logarithms to the base 2", LOSSES, "return torch.log_softmax(scaled, dim=1)", "return torch.log_softmax(scaled, dim=1) / math.log(2)", "distill/test_losses.py", DENSE),
    Mutant("JSD with beta on the wrong side", LOSSES, "torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))", "torch.logaddexp(log_s + math.log(beta), log_t + math.log1p(-beta))", "distill/test_losses.py", "jsd"),
    Mutant("gradient without its centring", LOSSES, "gradient = slope.addcmul_(s, slope.sum(dim=1, keepdim=True), value=-1)", "gradient = slope", "distill/test_losses.py", "dense_autograd"),
    Mutant("gradient at the wrong temperature", LOSSES, 'gradient.mul_(rearrange(weights / options.temperature, "rows -> rows 1"))', 'gradient.mul_(rearrange(weights, "rows -> rows 1"))', "distill/test_losses.py", "dense_autograd"),
    Mutant("clip of the wrong sign", LOSSES, "value.clamp_(max=options.clip_value)", "value.clamp_(min=-options.clip_value)", "distill/test_losses.py", "dense_autograd or clip"),
    Mutant("clipped entries keep their gradient", LOSSES, "slope.masked_fill_(value > options.clip_value, 0)", "pass", "distill/test_losses.py", "dense_autograd"),
    Mutant("masked tokens counted", LOSSES, "kept = weights.nonzero().squeeze(1)", "kept = torch.arange(tokens, device=weights.device); weights = torch.ones_like(weights)", "distill/test_losses.py", "masked"),
    Mutant("last chunk dropped", LOSSES, "for start in range(0, tokens, max(1, chunk)):", "for start in range(0, tokens - 1, max(1, chunk)):", "distill/test_losses.py", "chunk_size"),
    Mutant("entropy without its sign", LOSSES, "torch.sum(s * log_s, dim=1, out=student_entropy).neg_()", "torch.sum(s * log_s, dim=1, out=student_entropy)", "distill/test_losses.py", "by_hand"),
    Mutant("tail left out", LOSSES, "rest = torch.log(-torch.expm1(mass.clamp(max=-1e-7)))", "rest = torch.full_like(mass, -30.0)", "distill/test_losses.py", "topk_value"),
    # the step
    Mutant("hidden states one position late", HIDDEN, "torch.cat([prefix.last_hidden[:, None], rest], dim=1)", "torch.cat([rest, prefix.last_hidden[:, None]], dim=1)", "distill/test_train.py", "completion_hidden"),
    Mutant("hidden states shifted by one", HIDDEN, "shown = [completion[:-1] or completion for completion in completions]", "shown = [completion[1:] or completion for completion in completions]", "distill/test_train.py", "completion_hidden"),
    Mutant("last position dropped", HIDDEN, "(position < first + lengths)]", "(position < first + lengths - 1)]", "distill/test_train.py", "completion_hidden"),
    Mutant("whole rows predicted by the token itself", HIDDEN, "[[len(prompt) - 1] for prompt in prompts]", "[[len(prompt)] for prompt in prompts]", "distill/test_student.py", ""),
    Mutant("student sees the context", STEP, "prompts = [row.task.student_prompt for row in batch]", "prompts = [row.task.teacher_prompt for row in batch]", "distill/test_train.py", "plain_mean_kl or context_teaches"),
    Mutant("teacher sees the bare question", STEP, "[row.task.teacher_prompt for row in batch]", "[row.task.student_prompt for row in batch]", "distill/test_train.py", "context_teaches or plain_mean_kl"),
    Mutant("mean over rollouts for mean over tokens", STEP, 'config.loss_mean == "token" and', 'config.loss_mean != "token" and', "distill/test_train.py", "plain_mean_kl"),
    Mutant("cut-off rollouts in the loss", TASKS, "config.keep_truncated or rollout.finish_reason", "not config.keep_truncated or rollout.finish_reason", "distill/test_train.py", "cut_off"),
    Mutant("first tokens not skipped", STEP, "in_loss = position >= config.skip_first", "in_loss = position >= 0", "distill/test_train.py", "plain_mean_kl"),
    Mutant("teacher is the trained model", TEACHER, 'elif self.name != "live" and self._adapter is not None and self._copy is None:', "elif False:", "distill/test_train.py", "stays_the_untrained"),
    Mutant("average the wrong way round", TEACHER, "1 - self._decay", "self._decay", "distill/test_train.py", "ema_teacher_averages"),
    Mutant("weights of questions ignored", TASKS, "teacher.teacher(shown, context), row.weight)", "teacher.teacher(shown, context))", "trust/test_numeric_core.py", "weights"),
    Mutant("every step the same questions", TASKS, "first = (step - 1) * size", "first = 0", "distill/test_train.py", "every_epoch"),
    # votes and answers
    Mutant("non-answers win votes", VOTE, "counts = Counter(answer for answer in answers if answer is not None)", "counts = Counter(str(answer) for answer in answers)", "neurosig/questions/test_answers.py", "never_wins"),
    Mutant("non-answers leave the denominator", VOTE, "return Vote(winner, most, tied, len(answers))", "return Vote(winner, most, tied, sum(counts.values()))", "neurosig/questions/test_answers.py", "never_wins"),
    Mutant("ties by the alphabet", VOTE, 'winner = min(tied, key=lambda candidate: hashlib.sha256(f"{question_id}\\x00{candidate}".encode()).digest())', "winner = tied[0]", "neurosig/questions/test_answers.py", "ties"),
    Mutant("ties by the order of the answers", VOTE, "tied = tuple(sorted(candidate for candidate, count in counts.items() if count == most))", "tied = tuple(candidate for candidate, count in counts.items() if count == most)", "neurosig/questions/test_answers.py", "ties"),
    Mutant("first number for the last", NUMBERS, "_value(chosen[0 if first or is_equation else -1])", "_value(chosen[0])", "neurosig/questions/test_answers.py", "numbers"),
    Mutant("aliases never count", GRADING, "for gold in (question.answer, *question.aliases)", "for gold in (question.answer,)", "neurosig/questions/test_answers.py", "gold_or_an_alias"),
    # accuracy and calibration
    Mutant("ties count as right", METRICS, "return n_tied_right / np.maximum(n_tied, 1)", "return (n_tied_right > 0).astype(float)", "neurosig/statistics/test_metrics.py", "maj_at_k"),
    Mutant("pass@k for one sample fewer", METRICS, "1.0 - math.comb(n - right, k) / math.comb(n, k)", "1.0 - math.comb(n - right, k) / math.comb(n + 1, k)", "neurosig/statistics/test_metrics.py", "pass_at_k"),
    Mutant("ECE squared", METRICS, "np.abs(np.bincount(keys, weights=votes / k - accuracy)).sum()", "np.square(np.bincount(keys, weights=votes / k - accuracy)).sum()", "neurosig/statistics/test_metrics.py", "ece_by_hand"),
    Mutant("ECE with its edges on the wrong side", METRICS, "np.maximum((votes * bins + k - 1) // k - 1, 0)", "np.minimum(votes * bins // k, bins - 1)", "neurosig/statistics/test_metrics.py", "bins or beyond"),
    Mutant("ECE over bins instead of questions", METRICS, "weights=votes / k - accuracy)).sum() / len(votes))", "weights=votes / k - accuracy)).sum() / len(set(keys)))", "neurosig/statistics/test_metrics.py", "ece_by_hand"),
    Mutant("Brier score of ties", METRICS, "(votes / k - accuracy) ** 2 + accuracy * (1 - accuracy)", "(votes / k - accuracy) ** 2", "neurosig/statistics/test_metrics.py", "brier"),
    Mutant("gap of the wrong sign", METRICS, "return float(np.mean(votes / k - accuracy))", "return float(np.mean(accuracy - votes / k))", "neurosig/statistics/test_metrics.py", ""),
    Mutant("interval of the wrong level", RESAMPLING, "np.array([tail, 1 - tail])", "np.array([2 * tail, 1 - 2 * tail])", "neurosig/statistics/test_metrics.py", "scipy"),
    Mutant("p-value of one side", STATISTICS, "return min(1.0, 2 * (1 + tail) / (1 + len(draws)))", "return min(1.0, (1 + tail) / (1 + len(draws)))", "neurosig/statistics/test_significance.py", "by_hand"),
    Mutant("p-value that can be zero", STATISTICS, "2 * (1 + tail) / (1 + len(draws))", "2 * tail / len(draws)", "neurosig/statistics/test_significance.py", "by_hand"),
    Mutant("Holm without its steps", STATISTICS, "(len(p_values) - rank) * p_values[index]", "p_values[index]", "neurosig/statistics/test_significance.py", "by_hand"),
    Mutant("draws that are no resamples", RESAMPLING, "rng.integers(n, size=(min(block, resamples - start), n))", "rng.permuted(np.tile(np.arange(n), (min(block, resamples - start), 1)), axis=1)", "neurosig/statistics/test_significance.py", "draws or covers"),
    # neurons
    Mutant("CETT without its norm", CONTRIBUTIONS, "return magnitude(value, w_out_norm).div_(ffn_out.float().norm(dim=-1, keepdim=True))", "return magnitude(value, w_out_norm)", "neurosig/neurons/test_contributions.py", "cett"),
    Mutant("CETT with one norm for all positions", CONTRIBUTIONS, "ffn_out.float().norm(dim=-1, keepdim=True)", "ffn_out.float().norm(dim=(-2, -1), keepdim=True)", "neurosig/neurons/test_contributions.py", "cett"),
    Mutant("padding counted in the mean", CONTRIBUTIONS, "/ mask.sum(dim=1, keepdim=True)", "/ mask.shape[1]", "neurosig/neurons/test_contributions.py", "masked_mean"),
    Mutant("the smallest for the largest", CONTRIBUTIONS, "order = mean.sort(dim=-1, descending=True, stable=True)", "order = mean.sort(dim=-1, descending=False, stable=True)", "neurosig/neurons/test_contributions.py", "largest"),
    Mutant("ties left to chance", CONTRIBUTIONS, "order = mean.sort(dim=-1, descending=True, stable=True).indices[:, :share]", "order = mean.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :share].neg().add(mean.shape[-1] - 1)", "neurosig/neurons/test_contributions.py", "largest"),
    Mutant("padding in the union", CONTRIBUTIONS, '(_of_each_token(score, share) & rearrange(mask, "batch seq -> batch seq 1")).any(dim=1)', "_of_each_token(score, share).any(dim=1)", "neurosig/neurons/test_contributions.py", "per_token"),
    Mutant("magnitude with its sign", CONTRIBUTIONS, "return value.abs().float().mul_(w_out_norm)", "return value.float().mul(w_out_norm)", "neurosig/neurons/test_contributions.py", ""),
    Mutant("sets rounded down", CONTRIBUTIONS, "return min(-(-set_size // n_layers), d_mlp)", "return min(set_size // n_layers, d_mlp)", "neurosig/neurons/test_contributions.py", "neurons_per_layer"),
    Mutant("norms of the wrong layer", REDUCTION, "if norms is None else norms[layer]", "if norms is None else norms[layer - 1]", "neurosig/neurons/test_tracer.py", "equals_forward_hooks and qwen3"),
    Mutant("positive neurons only, always", REDUCTION, "return (member & (mean > 0) if positive_only else member), mean", "return member & (mean > 0), mean", "neurosig/neurons/test_tracer.py", "positive_only or smaller_sets or equals_forward_hooks"),
    Mutant("hidden states over the padding", REDUCTION, "return masked_mean(hidden.float(), mask.to(hidden.device))", "return hidden.float().mean(1)", "neurosig/neurons/test_tracer.py", "hidden_states_are or padded"),
    Mutant("the end token traced", ROLLOUTS, "return self.completion_ids[:-1] if ended else self.completion_ids", "return self.completion_ids", "trust/test_numeric_core.py", "end_token"),
    # sampling
    Mutant("temperature multiplied", SAMPLING, "scores = scores / config.temperature", "scores = scores * config.temperature", "neurosig/sampling/test_sampler.py", "softmax or first_tokens"),
    Mutant("one random number for all questions", SAMPLING, r'f"{config.seed}\x00{salt}\x00{question_id}"', r'f"{config.seed}\x00{salt}"', "neurosig/sampling/test_sampler.py", "draws_its_own"),
    Mutant("the seed ignored", SAMPLING, r'f"{config.seed}\x00{salt}\x00{question_id}"', r'f"{salt}\x00{question_id}"', "neurosig/sampling/test_sampler.py", "draws_its_own"),
    Mutant("top-p without the token that crosses it", SAMPLING, "ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)", "ranked.softmax(-1).cumsum(-1)", "neurosig/sampling/test_sampler.py", "top_k_and_top_p"),
    Mutant("entropy in bits", SAMPLING, "entropy = -torch.linalg.vecdot(log_p.exp(), log_p)", "entropy = -torch.linalg.vecdot(log_p.exp(), log_p) / 0.6931", "neurosig/sampling/test_sampler.py", "log_probabilities_and"),
    Mutant("positions that count the padding", BATCHING, "position_ids=(mask.long().cumsum(-1) - 1).clamp_min(0)", "position_ids=torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)", "distill/test_train.py", "completion_hidden"),
)  # fmt: skip


def caught(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails on the mutant, made in the copies in ``folder`` and undone.

    Raises:
        LookupError: The text to replace is not in the file.
        RuntimeError: The tests did not run.
    """
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    if mutant.old not in text:
        raise LookupError(f"{mutant.name}: its text is not in {mutant.file}; update the mutant")
    path.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
    try:
        code, output = run_tests(mutant, folder)
    finally:
        path.write_text(text, encoding="utf-8")
    if code not in (0, NOTICED):
        raise RuntimeError(f"{mutant.name}: the tests did not run (exit code {code}): {output[-800:]}")
    return code == NOTICED


def run_tests(mutant: Mutant, folder: Path) -> tuple[int, str]:
    """Exit code and output of pytest in a new process, forked if this one has not imported the packages."""
    tests = [str(Path("tests") / name) for name in mutant.tests.split()]
    words = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        *(["-k", mutant.only] if mutant.only else []),
        *tests,
    ]
    if "neurosig" in sys.modules:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout
    pid = os.fork()
    if pid == 0:
        import pytest

        code = 99
        try:
            os.chdir(folder)
            sys.dont_write_bytecode = True
            log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = int(pytest.main(words))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (folder / "output.txt").read_text(errors="replace")


def copied(folder: Path) -> Path:
    """Copy packages, tests and their configuration."""
    for name in ("neurosig", "distill", "figures", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def preload() -> None:
    """Import the libraries of the tests before forking: beartype first, as in conftest, and never nnsight."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("beartype", "pytest", "torch", "transformers", "peft", "scipy.stats", "hypothesis", "pyarrow.parquet"):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


def main() -> None:
    preload()
    survivors, broken, n_caught = [], [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = copied(Path(temporary))
        for mutant in MUTANTS:
            try:
                if caught(mutant, folder):
                    n_caught += 1
                    continue
                survivors.append(mutant.name)
                print(f"survived: {mutant.name}", flush=True)
            except (LookupError, RuntimeError) as error:
                broken.append(mutant.name)
                print(error, flush=True)
    print(f"mutants caught: {n_caught} of {len(MUTANTS)}")
    if survivors or broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
