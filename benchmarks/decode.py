"""How fast a student decodes beside its teacher, at batch 1, and what that costs in quality.

    make bench-decode          or, without llama.cpp:  python -m benchmarks.decode --skip-llama

The student of a run folder (the quickstart's) in its quantised decoder; its teacher's GGUF file in llama.cpp and
its bf16 form in transformers' `generate` (and in fp32 where the hardware has no bf16, which emulates it slowly); all
on the same cores, one after the other. Quality is measured on the run's validation documents, read by the decoder
token by token: how often the two-step head's choice differs from that of the exact int8 head on the same hidden state,
and the loss of the distribution it samples from against the fp32 student's.

A token needs each weight of body and preview once, so memory bandwidth bounds the speed. Bandwidth is that of
reading as many bytes as a step reads, again and again, with all cores (they stay in the caches, as the weights
do), by the fastest of three torch reductions; that of memory proper is given beside it.

Legend: M tokens scored, V vocabulary, W the same rounded up to blocks, d head's width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from benchmarks.report import finish, print_table
from benchmarks.train import run_process
from distill import losses
from distill.command import guarded
from distill.config import TeacherConfig, UserError
from distill.corpus import load_corpus, separator_id
from distill.decode import Decoder, find_student, load_decoder
from distill.decoder import TOKENS
from distill.job import select_documents
from distill.metrics import Documents
from distill.recipe import load_recipe
from distill.samples import decode_speed
from distill.sampling import Sampler
from distill.session import available_cores
from distill.student import LSTMForCausalLM
from distill.teacher import LanguageModel, hardware_has_bf16, load_language_model
from distill.torch_decoder import load_student
from eval.command import Subject
from eval.runtimes import LlamaCppSession, Unavailable, decoder_step_bytes

LLAMA_TOKENS, LLAMA_REPEATS, LLAMA_ROOM = 128, 5, 512


def quality(student: LSTMForCausalLM, decoder: Decoder, folder: Path, documents: Documents) -> dict[str, float]:
    """`greedy_top1_miss`, `sampling_loss_increase` and `head_kl_nats` over all documents."""
    weights = load_file(folder / "decoder.safetensors")
    scale_W, bias_W = weights["head.scale"].flatten(), weights["head.bias"].flatten()
    head_Wd = weights["head"].unflatten(1, (-1, TOKENS)).mT.flatten(0, 1).float()
    greedy = Sampler(0)
    misses, targets, divergence = 0, 0, 0.0
    loss = {"decoder": 0.0, "student": 0.0}
    for tokens in documents.tokens:
        ids_T, labels_T = torch.from_numpy(tokens[:-1].astype(np.int64)), torch.from_numpy(tokens[1:].astype(np.int64))
        lanes, chosen, sampled, hidden = decoder.lanes(1), [], [], []
        for token in ids_T.tolist():
            lanes.read([token])
            chosen.append(lanes.choose(0, greedy))
            hidden.append(_rounded(lanes.u_Bd[0]))
            sampled.append(lanes.logits(0))
        with torch.inference_mode():
            expected_TV = student(ids_T[None], use_cache=False).logits[0]
        sums_TW = torch.from_numpy(np.stack(hidden)) @ head_Wd.T * scale_W + bias_W
        exact_TV = sums_TW[:, torch.from_numpy(decoder.place_V)]
        misses += int((exact_TV.argmax(1) != torch.tensor(chosen)).sum())
        targets += len(labels_T)
        two_step_TV = torch.from_numpy(np.stack(sampled))
        divergence += float(losses.forward_kl(two_step_TV, exact_TV))
        loss["student"] += float(F.cross_entropy(expected_TV, labels_T, reduction="sum"))
        loss["decoder"] += float(F.cross_entropy(two_step_TV, labels_T, reduction="sum"))
    return {
        "greedy_top1_miss": misses / targets,
        "sampling_loss_increase": loss["decoder"] / loss["student"] - 1,
        "head_kl_nats": divergence / targets,
        "tokens_scored": targets,
    }


def _rounded(u_d: np.ndarray) -> np.ndarray:
    """u in the 8 bits that ONNX's DynamicQuantizeLinear gives it, multiplied out."""
    low, high = min(0.0, float(u_d.min())), max(0.0, float(u_d.max()))
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return ((np.clip(np.rint(u_d / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def bandwidth(size: int) -> float:
    """Bytes a second at which all cores read `size` bytes again and again."""
    floats, whole = torch.ones(size // 4), torch.ones(size // 8, dtype=torch.int64)
    ways: list[Callable[[], object]] = [floats.sum, lambda: torch.dot(floats, floats), whole.sum]
    best = 0.0
    for way in ways:
        seconds = []
        for _ in range(max(20, 2**31 // size // 8)):
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        best = max(best, size / statistics.median(seconds))
    return best


def open_llama(config: TeacherConfig) -> LlamaCppSession | None:
    """The recipe's teacher in llama.cpp, None unless it is a file for that; UserError where there is no llama.cpp."""
    if not config.model.endswith(".gguf"):
        return None
    try:
        return LlamaCppSession(Subject("teacher", "teacher", config), available_cores(), LLAMA_ROOM)
    except Unavailable as error:
        raise UserError(f"llama.cpp: {error}; make bench-decode builds it, --skip-llama goes without") from None


def llama_speed(session: LlamaCppSession) -> dict[str, Any]:
    """Tokens a second of greedy decoding after five tokens: the median of a few times, after one to warm up."""
    rates = []
    for _ in range(LLAMA_REPEATS + 1):
        tokens_B = session.start(np.array([[1, 2, 3, 4, 5]]))
        began = time.perf_counter()
        for _ in range(LLAMA_TOKENS):
            tokens_B = session.step(tokens_B)
        rates.append(LLAMA_TOKENS / (time.perf_counter() - began))
    return {"tokens_per_second": statistics.median(rates[1:]), "version": session.llama.version}


def benchmark(options: argparse.Namespace) -> None:
    torch.set_num_threads(available_cores())
    recipe = load_recipe(options.run)
    folder = find_student(options.run)
    session = None if options.skip_llama else open_llama(recipe.teacher)
    decoder = load_decoder(folder)
    measured = run_process([sys.executable, "-m", "benchmarks.decode_stream", str(folder)])
    llama = llama_speed(session) if session else None
    session = None  # its process ends
    step_bytes = decoder_step_bytes(decoder, load_file(folder / "decoder.safetensors"))
    caches, memory = bandwidth(step_bytes), bandwidth(2**29)
    device = torch.device("cpu")
    generate: dict[str, float] = {}
    for dtype in ("bf16",) if hardware_has_bf16(device) else ("bf16", "fp32"):
        teacher = load_language_model(recipe.teacher.model, device=device, dtype=dtype, role="teacher")
        separator = separator_id(teacher.tokenizer, recipe.corpus.separator)
        generate[dtype] = decode_speed(teacher, separator, seconds=options.seconds)
    fastest = max(generate.values())
    student = load_student(folder)
    plain = decode_speed(_as_model(student, teacher), separator, seconds=options.seconds)
    validation = load_corpus(recipe.corpus, teacher.tokenizer).validation
    found = quality(student, decoder, folder, select_documents(validation, options.max_tokens))

    speeds = {f"student, decoder, {name}": row["tokens_per_second"] for name, row in measured["rows"].items()}
    speeds |= {
        "student, fp32, generate": plain,
        **{f"teacher, {dtype}, generate": rate for dtype, rate in generate.items()},
    }
    if llama:
        quantised = Path(recipe.teacher.model).stem.rpartition(".")[2]
        speeds[f"teacher, {quantised}, llama.cpp"] = llama["tokens_per_second"]
    reference = llama["tokens_per_second"] if llama else float("nan")
    rows = [
        {
            "model, way": name,
            "tok/s": f"{speed:,.0f}",
            "× llama.cpp": f"{speed / reference:.2f}" if llama else "–",
            "× generate": f"{speed / fastest:.1f}",
        }
        for name, speed in speeds.items()
    ]
    greedy = measured["rows"]["greedy"]
    ideal_us = step_bytes / caches * 1e6
    figures = {
        "greedy_vs_llama_cpp_q4": greedy["tokens_per_second"] / reference if llama else None,
        "greedy_vs_teacher_generate_bf16": greedy["tokens_per_second"] / generate["bf16"],
        "greedy_vs_teacher_generate": greedy["tokens_per_second"] / fastest,
        "greedy_top1_miss": found["greedy_top1_miss"],
        "sampling_vs_llama_cpp_q4": measured["rows"]["sampling"]["tokens_per_second"] / reference if llama else None,
        "sampling_loss_increase": found["sampling_loss_increase"],
        "bandwidth_fraction": ideal_us / greedy["latency_us_p50"],
        "bandwidth_fraction_of_memory": step_bytes / memory * 1e6 / greedy["latency_us_p50"],
        "p99_over_p50": greedy["latency_us_p99"] / greedy["latency_us_p50"],
        "late_over_early": measured["late_us"] / measured["early_us"],
        "resident_mib": measured["resident_mib"],
        "head_kl_nats": found["head_kl_nats"],
    }
    note = (
        f"A step reads {step_bytes / 2**20:.1f} MiB of weights, {ideal_us:.0f} µs at the {caches / 1e9:.0f} GB/s of "
        f"the caches (memory: {memory / 1e9:.0f} GB/s), and takes {greedy['latency_us_p50']:.0f} µs (p50), "
        f"{greedy['latency_us_p99']:.0f} µs (p99). Choices that differ from the exact int8 head's: "
        f"{found['greedy_top1_miss']:.3%} of {found['tokens_scored']:,}; loss {found['sampling_loss_increase']:+.3%} "
        f"beside fp32; KL from the exact int8 head to the two steps {found['head_kl_nats']:.4f} nats; "
        f"{measured['resident_mib']:.0f} MiB resident."
    )
    print_table(f"Decoding {options.run} at batch 1 on {available_cores()} cores", rows, note)
    details = {"rows": measured["rows"], "tokens_per_second": speeds, "llama_cpp": llama, "quality": found}
    finish("decode", {**figures, **details})


def _as_model(student: LSTMForCausalLM, teacher: LanguageModel) -> LanguageModel:
    return LanguageModel(student, teacher.tokenizer, teacher.head, "student")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="runs/quickstart", help="a run folder (runs/quickstart: make distill)")
    parser.add_argument("--skip-llama", action="store_true", help="without llama.cpp")
    parser.add_argument("--max-tokens", type=int, default=4000, help="validation tokens to score (4000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring `generate` (10)")
    options = parser.parse_args(arguments)
    return guarded(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
