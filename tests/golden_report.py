"""`python -m tests.golden_report`: every golden file with the checks made of it and the worst difference seen.

Runs the golden tests and watches their comparisons; knows which test reads which file, not what is compared.
"""

import sys
from collections import defaultdict
from typing import Any

import pytest
import torch

import llada_core.sampling

FILES = ["modeling/test_golden_logits.py", "modeling/test_checkpoints.py", "sampling/test_golden.py"]
FILES += ["likelihood/test_golden.py", "training/test_golden.py", "training/test_rewards.py", "test_diffusion.py"]
FILES += ["modeling/test_llada2.py", "sampling/test_llada2.py", "training/test_blocks.py"]
READS = {
    "logits_llada.npz": "embeddings_as_input bfloat16 tied_head rope",
    "logits_moe.npz": "router shared_expert_dense_layer_and_router_bias",
    "generate_llada.npz": "generate_llada generate_llada_on_the_way generate_llada_among_ties",
    "generate_moe.npz": "generate_moe",
    "generate_fastdllm.npz": "generate_fastdllm cached_logits",
    "sampler_dllm.npz": "sampler_dllm sampler_dllm_among_ties",
    "gumbel.npz": "gumbel",
    "likelihood.npz": "recorded_canvases enumeration one_token_is_exact_with_one_sample greedy_check"
    " greedy_check_of_many_lengths_at_once",
    "loss.npz": "the_guideline_losses the_dllm_losses",
    "grpo.npz": "the_log_probabilities_of_d1 the_guided_log_probabilities_of_d1 the_policy_loss_of_d1"
    " the_advantages_of_d1",
    "schedulers.npz": "schedules_are_dllms",
    "rewards.json": "golden",
    "cases.json (schedules, counts)": "schedules schedules_of_several_rows lattices",
    "cases.json (gradient norms)": "the_gradient_of_every_parameter",
    "logits_llada2.npz": "logits a_block_as_long_as_the_row_is_the_bidirectional_model padding_on_either_side"
    " hidden_states_and_the_first_layer_piece_by_piece chosen_experts_their_weights_and_what_comes_out"
    " embeddings_positions_and_bfloat16 cached_block_by_block_and_after_a_prefill",
    "sampler_llada2.npz": "without_a_stop_the_whole_room_is_written two_rows_at_once_are_the_published_ones",
    "loss_llada2.npz": "the_losses_of_dfactory the_gradient_in_all the_confidence_loss_of_dparallel"
    " certainty_counts_where_the_prediction_is_right",
    "cases_llada2_loss.json": "the_losses_of_dllm the_gradient_of_every_published_weight",
}
FILE_OF = {f"test_{name}": file for file, names in READS.items() for name in names.split()}
AMONG_OURS = "test_the_cache_is_exact"  # with and without a cache, on the prompts of a golden file
FOLDERS = "test_load_save_load_is_bit_identical_under_the_published_keys"


class Watch:
    """A pytest plugin that keeps, per golden file, passes, failures, differences and forwards."""

    def __init__(self) -> None:
        self.file = ""
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: dict[str, int] = defaultdict(int)
        self.worst: dict[str, float] = defaultdict(float)
        self.forwards: dict[str, int] = defaultdict(int)
        self.recorded: dict[str, int] = defaultdict(int)

    @staticmethod
    def file_of(item: Any) -> str:
        """The golden file that a test compares with; empty for other tests."""
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if item.originalname == FOLDERS:
            return f"{given['name']}/ (loaded, saved, loaded)"
        if item.originalname == AMONG_OURS:
            return ""
        return f"{given['file']}.npz" if "file" in given else FILE_OF.get(item.originalname, "")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if self.file_of(item)]

    def pytest_runtest_setup(self, item: Any) -> None:
        self.file = self.file_of(item)
        self.recorded[self.file] += recorded_forwards(item)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed[self.file] += 1
        elif report.when == "call":
            self.passed[self.file] += 1

    def saw(self, actual: Any, expected: Any) -> None:
        """Keeps the largest absolute difference of two numbers, tensors, or dictionaries of numbers."""
        if isinstance(expected, dict):
            for key in expected:
                self.saw(actual[key], expected[key])
        else:
            difference = (torch.as_tensor(actual).double() - torch.as_tensor(expected).double()).abs()
            self.worst[self.file] = max(self.worst[self.file], float(difference.nan_to_num(0.0).max()))


class Near:
    """`pytest.approx` that tells what it was compared with."""

    def __init__(self, watch: Watch, expected: Any, inner: Any) -> None:
        self.watch, self.expected, self.inner = watch, expected, inner

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, actual: object) -> bool:
        self.watch.saw(actual, self.expected)
        return bool(actual == self.inner)


def recorded_forwards(item: Any) -> int:
    """What the reference took for the case of a sampler's test, where it was recorded."""
    from tests.reference import arrays, block_cases, case

    test, given = item.originalname, getattr(getattr(item, "callspec", None), "params", {})
    if test == "test_sampler_dllm":
        return len(arrays("sampler_dllm")[f"{given['name']}__histories"]) - 1
    if str(given.get("file")).startswith("sampler_llada2"):
        return int(block_cases(given["file"])[given["name"]]["nfe"])
    if test == "test_without_a_stop_the_whole_room_is_written":
        return int(block_cases("sampler_llada2")[given["name"]]["nfe_without_eos_stop"])
    if test == "test_two_rows_at_once_are_the_published_ones":
        return int(block_cases("sampler_llada2")["batch2"]["nfe_without_eos_stop"])
    key = {"test_generate_llada": "forward_calls", "test_generate_fastdllm": "nfe"}.get(test)
    if key:
        return int(case(test.removeprefix("test_"), given["name"])[key])
    return int(case("generate_moe", given["name"])["settings"]["steps"]) if test == "test_generate_moe" else 0


def watch_comparisons(watch: Watch) -> None:
    """Puts the watch into what the tests compare with and sample by; they must not have been imported yet."""
    close, approx = torch.testing.assert_close, pytest.approx

    def watched_close(actual: Any, expected: Any, **limits: Any) -> None:
        watch.saw(actual.detach(), expected)
        close(actual, expected, **limits)

    def counted(sample: Any) -> Any:
        def run(*arguments: Any, **settings: Any) -> Any:
            result = sample(*arguments, **settings)
            watch.forwards[watch.file] += result.forwards
            return result

        return run

    torch.testing.assert_close = watched_close
    pytest.approx = lambda expected, **limits: Near(watch, expected, approx(expected, **limits))  # type: ignore[assignment]
    llada_core.sampling.generate = counted(llada_core.sampling.generate)  # type: ignore[assignment]
    llada_core.sampling.infill = counted(llada_core.sampling.infill)  # type: ignore[assignment]


def bfloat16() -> str:
    """The bf16 case by the bounds of its README: mean difference and agreement of the likeliest token."""
    from llada_core.modeling import load_model
    from tests.reference import DENSE, GOLDEN, arrays

    data, model = arrays("logits_llada"), load_model(GOLDEN / "llada_tiny", dtype=torch.bfloat16, special_tokens=DENSE)
    with torch.no_grad():
        found = model(data["j_bf16_input_ids"]).logits.float()
    wanted = data["j_bf16_logits_as_float32"]
    agreement = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return f"mean {float((found - wanted).abs().mean()):.1e} (bound 5e-2), argmax {float(agreement):.0%} (bound 90 %)"


def main() -> int:
    """Prints the table; 1 if anything failed."""
    watch = Watch()
    watch_comparisons(watch)
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *(f"tests/{file}" for file in FILES)], [watch])
    print("\n| golden file | checks passed | worst absolute difference | forwards, ours of the reference's |")
    print("| --- | --- | --- | --- |")
    for file in sorted(watch.passed | watch.failed):
        total = watch.passed[file] + watch.failed[file]
        worst = f"{watch.worst[file]:.1e}" if file in watch.worst else "exact"
        forwards = f"{watch.forwards[file]} of {watch.recorded[file]}" if watch.recorded[file] else ""
        print(f"| {file} | {watch.passed[file]} of {total} | {worst} | {forwards} |")
    print(f"| logits_llada.npz, bf16 case | | {bfloat16()} | |")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
