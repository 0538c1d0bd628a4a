"""The sections of a run, the most valuable first: what each measures, and how long it may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A function `run(report)` of a module, called in a process of its own."""

    name: str
    module: str
    function: str
    seconds: int
    """Until it is stopped; less where little time is left."""
    caption: str


SECTIONS = (
    Section("compile", "compile_all", "run", 60, "every kernel of ours for this card, on all cores"),
    Section("ceilings", "ceilings", "run", 60, "copy, gather, row update, sort, matrix product, launch"),
    Section("correctness", "correctness", "run", 75, "ids of an exhaustive search, float64 errors, edges, equal bits"),
    Section("kernels", "kernels", "run", 60, "our operators beside the ceilings of the same ids and rows"),
    Section("layer", "layer", "run", 70, "the layer beside others: forward, backward, step"),
    Section("many-tokens", "layer", "run_many_tokens", 50, "the same with eight times as many tokens"),
    Section("one-head", "layer", "run_one_head", 40, "one head of k experts beside dense layers"),
    Section("graphs", "graphs", "run", 45, "no host synchronisation; a CUDA graph replays the eager bits"),
    Section("language-model", "language_model", "run", 70, "a short training: tokens per second, share of peak, loss"),
    Section("sanitizer", "sanitizer", "run", 60, "our checks at tiny sizes under compute-sanitizer, where it is"),
    Section("cached-rows", "cached_rows", "run", 30, "rows that stay on the host: bits, step times, rows found here"),
    Section("memory", "memory", "run", 45, "peak memory of a step, and at how many tokens it no longer fits"),
    Section("compiled", "compiled", "run", 120, "PEER-pytorch by torch.compile, also with max-autotune"),
)
