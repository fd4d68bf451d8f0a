"""The fused head and loss against plain autograd over full logits.

`eager` below computes every logit at once and lets autograd do the rest, from the definitions in
`test_losses.py`. In fp64 it is the oracle; how far it strays in fp32, or under bf16 autocast, says how far
the fused loss may stray.

    python -m pytest tests/test_fused.py

Legend: B lanes, T tokens, N = B * T, V vocabulary, d width of student output and head.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from test_losses import CONSTANTS, definition, softmax
from torch import Tensor

from distill import fused
from distill.fused import StudentWithLoss
from distill.objective import WEIGHT_SUM, Objective
from distill.signals import DenseSignal, Head, HiddenSignal, MixedSignal, Signal
from distill.student import LSTMCache, LSTMConfig, LSTMForCausalLM

B, T, V, D, H = 3, 7, 19, 6, 8
SMALL = 4  # times the eager error; the sums of a chunked loss are added in another order
EPS = torch.finfo(torch.float32).eps

Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, 12, 8, 3, 7)  # N = 21, V = 19: rests of all


def set_sizes(monkeypatch: pytest.MonkeyPatch, *sizes: int) -> None:
    """Tokens of the student's logits, of the teacher's, of a divergence at one time; columns of a tile."""
    monkeypatch.setattr(fused, "chunk_sizes", lambda *_: sizes)


def make_student(**fields) -> LSTMForCausalLM:
    sizes = {"vocab_size": V, "embedding_size": D, "hidden_size": H, "num_layers": 2}
    student = LSTMForCausalLM(LSTMConfig(**(sizes | fields)))
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return student


def make_batch() -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Inputs, labels, resets and a carried state."""
    generator = torch.Generator().manual_seed(2)
    inputs_BT = torch.randint(V, (B, T), generator=generator)
    labels_BT = torch.randint(V, (B, T), generator=generator)
    reset_BT = torch.rand(B, T, generator=generator) < 0.2
    state = torch.randn(2, 2, B, H, generator=generator) * 0.5
    return inputs_BT, labels_BT, reset_BT, (state[0], state[1])


def make_signal(kind: str, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> Signal:
    """As the teacher makes it: in inference mode. The second of the two that are `mixed` has another width."""
    if kind == "mixed":
        second = Head(torch.randn(V, 4, generator=torch.Generator().manual_seed(4)).to(dtype), softcap=3.0)
        with torch.inference_mode():
            hidden_Nd = torch.randn(B * T, 4, generator=torch.Generator().manual_seed(5)).to(dtype) * 2
            first = make_signal("hidden", dtype, softcap)
            assert isinstance(first, HiddenSignal)
            return MixedSignal((first, HiddenSignal(hidden_Nd, second)), (0.3, 0.7))
    generator = torch.Generator().manual_seed(3)
    weight_Vd = torch.randn(V, D, generator=generator).to(dtype)
    bias_V = torch.randn(V, generator=generator).to(dtype)
    head = Head(weight_Vd, bias_V, scale=0.7, softcap=softcap)
    with torch.inference_mode():
        hidden_Nd = torch.randn(B, T, D, generator=generator).to(dtype).flatten(0, 1)
        return DenseSignal(head.logits(hidden_Nd)) if kind == "dense" else HiddenSignal(hidden_Nd, head)


def eager(
    student: LSTMForCausalLM,
    signal: Signal | None,
    objective: Objective,
    dtype: torch.dtype,
    autocast: bool = False,
) -> tuple[dict[str, Tensor], Gradients]:
    """Each term's sum, under "loss" their weighted sum, and its gradients by parameter; in `dtype`."""
    student = copy.deepcopy(student).to(dtype)
    inputs_BT, labels_BT, reset_BT, state = make_batch()
    caught: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        cache = LSTMCache(*(part.to(dtype) for part in state))
        z_BTd = student.model(inputs_BT, past_key_values=cache, reset_mask=reset_BT).last_hidden_state
        if z_BTd.requires_grad:
            z_BTd.register_hook(caught.append)
        logits_NV = student.lm_head(z_BTd).flatten(0, 1)
    if autocast:
        logits_NV = logits_NV.float()
    teacher_NV = None if signal is None else teacher_logits(signal, logits_NV.dtype, objective.temperature)
    weight_N = token_weights(objective, logits_NV.detach(), teacher_NV)
    sums = {}
    for name in objective.weights:
        if name == "cross_entropy":
            log_q_NV = torch.log_softmax(logits_NV, -1)
            sums[name] = -(weight_N * log_q_NV.gather(1, labels_BT.flatten()[:, None])[:, 0]).sum()
        elif name == "hidden_mse":
            states = signal.parts[0] if isinstance(signal, MixedSignal) else signal
            hidden_Nd = states.hidden_Nd.clone().to(logits_NV.dtype)
            sums[name] = ((z_BTd.flatten(0, 1) - hidden_Nd) ** 2).sum() / D
        else:
            constants = objective.temperature, constant_of(name, objective)
            sums[name] = (weight_N * definition(name, logits_NV, teacher_NV, *constants)).sum()
    sums["loss"] = sum(objective.weights[name] * value for name, value in sums.items())
    sums["loss"].backward()
    if objective.token_weights != "none":
        sums[WEIGHT_SUM] = weight_N.sum()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    if caught:
        gradients["z"] = caught[0]
    return {name: value.detach() for name, value in sums.items()}, gradients


def constant_of(name: str, objective: Objective) -> float:
    return objective.skew if CONSTANTS.get(name) == "skew" else objective.jsd_beta


def teacher_logits(signal: Signal, dtype: torch.dtype, temperature: float) -> Tensor:
    """All of them, in `dtype`; of several teachers such that their softmax is the mean of the teachers' own."""
    if isinstance(signal, MixedSignal):
        logits = [teacher_logits(part, dtype, temperature) for part in signal.parts]
        pairs = zip(signal.weights, logits, strict=True)
        return temperature * sum(weight * softmax(logits_NV, temperature) for weight, logits_NV in pairs).log()
    with torch.inference_mode():
        logits_NV = signal.logits(slice(None))
    return logits_NV.clone().to(dtype)


def token_weights(objective: Objective, student_NV: Tensor, teacher_NV: Tensor | None) -> Tensor:
    """(N,), not yet divided by their mean; by their definitions."""
    if objective.token_weights == "none":
        return torch.ones(len(student_NV), dtype=student_NV.dtype)
    of_student = objective.token_weights == "student_entropy"
    p_NV = softmax(student_NV if of_student else teacher_NV, objective.temperature)
    return p_NV.amax(-1) if objective.token_weights == "teacher_confidence" else -(p_NV * p_NV.log()).sum(-1)


def run_fused(
    student: LSTMForCausalLM,
    signal: Signal | None,
    objective: Objective,
    autocast: bool = False,
    upstream: float = 1.0,
) -> tuple[dict[str, Tensor], Gradients]:
    """The same from `StudentWithLoss`."""
    module = StudentWithLoss(copy.deepcopy(student))
    caught: list[Tensor] = []

    def catch_z(_module, _arguments, output) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(caught.append)

    module.student.model.register_forward_hook(catch_z)
    inputs_BT, labels_BT, reset_BT, state = make_batch()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss, sums, _ = module(inputs_BT, labels_BT, reset_BT, state, signal, objective)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert not any(value.requires_grad for value in sums.values())
    (loss * upstream).backward()
    gradients = {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}
    if caught:
        gradients["z"] = caught[0]
    return {**sums, "loss": loss.detach()}, gradients


def assert_as_good_as_eager(
    student: LSTMForCausalLM, signal: Signal | None, objective: Objective, autocast: bool = False
) -> Gradients:
    """Every sum and gradient is as near to the fp64 oracle as eager code in the same precision, times SMALL."""
    exact_sums, exact = eager(student, signal, objective, torch.float64)
    eager_sums, rounded = eager(student, signal, objective, torch.float32, autocast)
    sums, gradients = run_fused(student, signal, objective, autocast)
    assert sums.keys() == exact_sums.keys()
    assert gradients.keys() == exact.keys()
    unit = torch.finfo(torch.bfloat16).eps if autocast else EPS
    for name, value in exact_sums.items():
        # One number can be right by chance: a mean rounding error of one unit is always allowed.
        error = max((eager_sums[name] - value).abs().item(), unit * value.abs().item())
        assert abs(sums[name] - value).item() <= SMALL * error, name
    for name, gradient in exact.items():
        assert torch.isfinite(gradients[name]).all(), name
        error = max((rounded[name] - gradient).norm().item(), unit * gradient.norm().item())
        assert (gradients[name] - gradient).norm().item() <= SMALL * error, name
    return gradients


DENSE_OBJECTIVES = {
    "cross_entropy": Objective({"cross_entropy": 1.0}),
    "forward_kl": Objective({"forward_kl": 1.0}),
    "forward_kl, T=2": Objective({"forward_kl": 1.0}, temperature=2.0),
    "reverse_kl": Objective({"reverse_kl": 2.0}, temperature=0.5),
    "jsd": Objective({"jsd": 1.0}, temperature=1.5, jsd_beta=0.2),
    "total_variation": Objective({"total_variation": 1.0}, temperature=2.0),
    "skewed_forward_kl": Objective({"skewed_forward_kl": 1.0}, temperature=2.0, skew=0.2),
    "skewed_reverse_kl": Objective({"skewed_reverse_kl": 1.0}, skew=0.4),
    "mixture": Objective({"forward_kl": 0.8, "cross_entropy": 0.2}, temperature=3.0),
    "all": Objective(
        {
            "cross_entropy": 0.1,
            "jsd": 0.5,
            "forward_kl": 0.3,
            "skewed_forward_kl": 0.6,
            "total_variation": 4.0,
            "skewed_reverse_kl": 0.9,
            "reverse_kl": 0.7,
        },
        temperature=2.0,
        jsd_beta=0.7,
        skew=0.3,
    ),
}
WEIGHTED_OBJECTIVES = {
    "all by teacher's entropy": replace(DENSE_OBJECTIVES["all"], token_weights="teacher_entropy"),
    "all by teacher's confidence": replace(DENSE_OBJECTIVES["all"], token_weights="teacher_confidence"),
    "all by student's entropy": replace(DENSE_OBJECTIVES["all"], token_weights="student_entropy"),
    "labels by teacher's entropy": Objective({"cross_entropy": 1.0}, 2.0, token_weights="teacher_entropy"),
    "labels by student's entropy": Objective({"cross_entropy": 1.0}, token_weights="student_entropy"),
}
HIDDEN_OBJECTIVES = {
    **DENSE_OBJECTIVES,
    **WEIGHTED_OBJECTIVES,
    "hidden_mse": Objective({"hidden_mse": 3.0}),
    "hidden_mse and forward_kl": Objective({"hidden_mse": 2.0, "forward_kl": 0.5}, temperature=2.0),
    "cross_entropy and hidden_mse": Objective({"cross_entropy": 0.3, "hidden_mse": 0.7}),
}
CASES = [
    *(("dense", name) for name in DENSE_OBJECTIVES | WEIGHTED_OBJECTIVES),
    *(("hidden", name) for name in HIDDEN_OBJECTIVES),
    *(("mixed", name) for name in HIDDEN_OBJECTIVES),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_sums_and_gradients_are_those_of_plain_autograd(kind: str, name: str) -> None:
    student = make_student(head_bias=True)
    gradients = assert_as_good_as_eager(student, make_signal(kind), HIDDEN_OBJECTIVES[name])
    head = {"lm_head.weight", "lm_head.bias"}
    expected = {parameter for parameter, _ in student.named_parameters()} | {"z"}
    assert gradients.keys() == (expected - head if name == "hidden_mse" else expected)
    assert all(gradient.any() for gradient in gradients.values()), "an all-zero gradient shows nothing"


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (7, 7, 7, 19), (12, 5, 5, 18), (21, 20, 20, 20), (22, 22, 21, 3), (5, 9, 4, 7), (512,) * 4]
)
def test_the_chunk_is_only_a_matter_of_memory(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, *sizes)
    assert_as_good_as_eager(make_student(head_bias=True), make_signal("hidden"), HIDDEN_OBJECTIVES["mixture"])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teachers_head_with_softcap_and_in_half_precision(dtype: torch.dtype, softcap: float | None) -> None:
    signal = make_signal("hidden", dtype, softcap)
    assert_as_good_as_eager(make_student(), signal, HIDDEN_OBJECTIVES["hidden_mse and forward_kl"])


@pytest.mark.parametrize("name", ["forward_kl", "mixture", "all", "hidden_mse and forward_kl"])
@pytest.mark.parametrize("head_bias", [False, True])
def test_under_autocast_as_near_to_fp64_as_eager_autocast(name: str, head_bias: bool) -> None:
    student, signal = make_student(head_bias=head_bias), make_signal("hidden", torch.bfloat16)
    gradients = assert_as_good_as_eager(student, signal, HIDDEN_OBJECTIVES[name], autocast=True)
    assert gradients["lm_head.weight"].dtype == torch.float32
    assert gradients["z"].dtype == torch.bfloat16, "autocast did not happen"


def test_under_autocast_the_head_runs_in_half_precision() -> None:
    """Else most of the time of a step would go into a matrix product in fp32."""
    objective, signal = HIDDEN_OBJECTIVES["forward_kl"], make_signal("dense")
    student, rounded = make_student(), make_student()
    rounded.lm_head.weight.data = rounded.lm_head.weight.data.bfloat16().float()
    (sums, gradients), (same, same_gradients) = (run_fused(s, signal, objective, True) for s in (student, rounded))
    assert torch.equal(sums["loss"], same["loss"])
    assert torch.equal(gradients["z"], same_gradients["z"])
    assert not torch.equal(sums["loss"], run_fused(student, signal, objective)[0]["loss"])


@pytest.mark.parametrize("name", ["all", "forward_kl", "mixture"])
@pytest.mark.parametrize("teachers_type", [torch.float32, torch.bfloat16])
def test_under_autocast_the_losses_are_computed_in_fp32(
    name: str, teachers_type: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the logits are rounded to bf16, not what is made of them."""
    set_sizes(monkeypatch, B * T, B * T, B * T, V)
    objective, student = DENSE_OBJECTIVES[name], make_student()
    signal = DenseSignal(make_signal("dense").logits_NV.clone().to(teachers_type))
    inputs_BT, labels_BT, reset_BT, state = make_batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z_BTd = student.model(inputs_BT, past_key_values=LSTMCache(*state), reset_mask=reset_BT).last_hidden_state
        logits_NV = student.lm_head(z_BTd).flatten(0, 1)
        _, sums, _ = StudentWithLoss(student)(inputs_BT, labels_BT, reset_BT, state, signal, objective)
    assert logits_NV.dtype == torch.bfloat16
    for term, found in sums.items():
        if term == "cross_entropy":
            log_q_NV = torch.log_softmax(logits_NV.double(), -1)
            expected = -log_q_NV.gather(1, labels_BT.flatten()[:, None]).sum()
        else:
            constants = objective.temperature, constant_of(term, objective)
            expected = definition(term, logits_NV.double(), signal.logits_NV.double(), *constants).sum()
        assert abs(found - expected) <= 16 * EPS * expected, term


def test_tied_embedding_and_head_share_one_gradient() -> None:
    student = make_student(tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    gradients = assert_as_good_as_eager(student, make_signal("hidden"), HIDDEN_OBJECTIVES["mixture"])
    assert "lm_head.weight" not in gradients and "model.embed_tokens.weight" in gradients


@pytest.mark.parametrize("frozen", ["lm_head.weight", "lm_head", "model", "model.embed_tokens"])
def test_frozen_parts_get_no_gradient_and_change_nothing_else(frozen: str) -> None:
    student = make_student(head_bias=True)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    gradients = assert_as_good_as_eager(student, make_signal("dense"), DENSE_OBJECTIVES["mixture"])
    assert not any(name.startswith(frozen) for name in gradients)
    assert ("z" in gradients) == (frozen != "model")


@pytest.mark.parametrize("name", ["mixture", "hidden_mse and forward_kl"])
def test_the_upstream_gradient_scales_all_gradients(name: str) -> None:
    student, signal, objective = make_student(head_bias=True), make_signal("hidden"), HIDDEN_OBJECTIVES[name]
    _, ones = run_fused(student, signal, objective)
    _, scaled = run_fused(student, signal, objective, upstream=0.25)  # a power of two: exact
    for gradient_name, gradient in ones.items():
        assert torch.equal(scaled[gradient_name], 0.25 * gradient), gradient_name


@pytest.mark.parametrize("name", [name for name in DENSE_OBJECTIVES if name != "mixture"])
def test_extreme_logits_stay_finite(name: str) -> None:
    """Both sides sure of one token, not always the same one, at 10,000 nats; rows where they agree are among them."""
    student = make_student(head_bias=True)
    student.lm_head.bias.data[:] = -1e4
    student.lm_head.bias.data[3] = 1e4
    logits_NV = torch.full((B * T, V), -1e4)
    logits_NV[torch.arange(B * T), torch.arange(B * T) % 4] = 1e4
    sums, gradients = run_fused(student, DenseSignal(logits_NV), DENSE_OBJECTIVES[name])
    assert all(torch.isfinite(value) and value > 0 for value in sums.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("kind", ["dense", "hidden"])
def test_the_signal_is_left_as_it_was(kind: str) -> None:
    """A cached signal is used again; nothing may be computed in its place."""
    signal, untouched = make_signal(kind), make_signal(kind)
    for name in DENSE_OBJECTIVES:
        run_fused(make_student(), signal, DENSE_OBJECTIVES[name])
    assert torch.equal(signal.logits(slice(None)), untouched.logits(slice(None)))


def test_gradients_of_two_micro_batches_add_up() -> None:
    student, signal, objective = make_student(), make_signal("dense"), DENSE_OBJECTIVES["mixture"]
    inputs_BT, labels_BT, _, _ = make_batch()
    module = StudentWithLoss(copy.deepcopy(student))
    module(inputs_BT, labels_BT, None, None, signal, objective)[0].backward()
    whole = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    for lanes in (slice(0, 1), slice(1, B)):
        part = DenseSignal(signal.logits_NV.view(B, T, V)[lanes].flatten(0, 1))
        module(inputs_BT[lanes], labels_BT[lanes], None, None, part, objective)[0].backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad - whole[name]).norm() <= 64 * EPS * whole[name].norm(), name


def test_cross_entropy_needs_no_teacher() -> None:
    assert_as_good_as_eager(make_student(), None, DENSE_OBJECTIVES["cross_entropy"])
    assert_as_good_as_eager(make_student(), None, WEIGHTED_OBJECTIVES["labels by student's entropy"])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (12, 5, 5, 18), (512,) * 4])
@pytest.mark.parametrize("kind", ["hidden", "mixed"])
def test_the_chunk_does_not_change_weights_or_means(
    kind: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_sizes(monkeypatch, *sizes)
    for name in WEIGHTED_OBJECTIVES:
        assert_as_good_as_eager(make_student(head_bias=True), make_signal(kind), WEIGHTED_OBJECTIVES[name])


def test_never_more_logits_of_a_teacher_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    product = Head.product

    def watched(head: Head, hidden_Nd: Tensor, out: Tensor | None = None) -> Tensor:
        made.append(len(hidden_Nd))
        return product(head, hidden_Nd, out)

    monkeypatch.setattr(Head, "product", watched)
    run_fused(make_student(), make_signal("mixed"), WEIGHTED_OBJECTIVES["all by teacher's entropy"])
    assert max(made) == 8 < B * T


def test_a_second_backward_is_refused() -> None:
    module = StudentWithLoss(make_student())
    loss, _, _ = module(*make_batch(), make_signal("dense"), DENSE_OBJECTIVES["forward_kl"])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(retain_graph=True)


def test_without_gradient_the_values_are_the_same() -> None:
    module, signal = StudentWithLoss(make_student()), make_signal("hidden")
    objective = HIDDEN_OBJECTIVES["hidden_mse and forward_kl"]
    loss, sums, _ = module(*make_batch(), signal, objective)
    with torch.no_grad():
        loss_only, sums_only, _ = module(*make_batch(), signal, objective)
    assert not loss_only.requires_grad
    assert sums.keys() == sums_only.keys()
    for found, expected in ((loss_only, loss), *((sums_only[name], sums[name]) for name in sums)):
        assert (found - expected).abs() <= 16 * EPS * expected  # nn.LSTM takes another kernel without gradients


def test_the_state_is_carried_without_its_gradient() -> None:
    """Two blocks in a row are one long block; no gradient flows back into the first."""
    module, signal, objective = StudentWithLoss(make_student()), None, DENSE_OBJECTIVES["cross_entropy"]
    inputs_BT, labels_BT, reset_BT, state = make_batch()
    before = [part.clone() for part in state]
    whole, _, end = module(inputs_BT, labels_BT, reset_BT, state, signal, objective)
    first, _, middle = module(inputs_BT[:, :4], labels_BT[:, :4], reset_BT[:, :4], state, signal, objective)
    second, _, last = module(inputs_BT[:, 4:], labels_BT[:, 4:], reset_BT[:, 4:], middle, signal, objective)
    assert (first + second - whole).abs() <= 16 * EPS * whole
    for found, expected in zip(last, end, strict=True):
        assert not found.requires_grad
        assert torch.allclose(found, expected, rtol=0, atol=16 * EPS)
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True)), "written in place"
