"""The student against its definition: plain loops over the equations, in fp64, are the oracle.

    python -m pytest tests/test_student.py

Shapes in names as in `distill/student.py`: B sequences, T positions, V vocabulary, d teacher's width,
H LSTM width, L layers. Tests of equality run in fp64, where what two right orders of summation may
differ by (TIGHT) is a million times smaller than what any wrong term would change; what fp32 may cost is
measured by running the oracle itself in fp32.
"""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import run_stranger
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from distill.student import LSTMCache, LSTMConfig, LSTMForCausalLM, LSTMModel, Rows

V, D, H, L = 29, 8, 16, 2
TIGHT = {"rtol": 0.0, "atol": 1e-11}


def make_student(seed: int = 2, dtype: torch.dtype = torch.float64, **fields) -> LSTMForCausalLM:
    """A tiny student, all of whose weights are random and large enough to matter, norms and biases too."""
    sizes = {"vocab_size": V, "embedding_size": D, "hidden_size": H, "num_layers": L}
    student = LSTMForCausalLM(LSTMConfig(**(sizes | fields)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in student.named_parameters():
        scale, mean = (0.5, 0.0) if parameter.ndim == 2 else (0.3, float("norm.weight" in name))
        parameter.data = mean + scale * torch.randn(parameter.shape, generator=generator)
    return student.to(dtype).eval()


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))  # 0 may be padding


def random_like(tensor: Tensor, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


# ---------------------------------------------------------------- the oracle: one step at a time


def gate_weights(weights: dict[str, Tensor], prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
    """W (H, 2H) over [h, x] and b (H) of each gate; torch stacks i, f, g, o and splits W and b in two."""
    parts = {name: weights[f"{prefix}.{name}_l0"].chunk(4) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    return {
        gate: (
            torch.cat([parts["weight_hh"][n], parts["weight_ih"][n]], dim=1),
            parts["bias_ih"][n] + parts["bias_hh"][n],
        )
        for n, gate in enumerate("ifgo")
    }


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def tanh(x: Tensor) -> Tensor:
    return 2 * sigmoid(2 * x) - 1


def oracle_step(gates: dict[str, tuple[Tensor, Tensor]], x_H: Tensor, h_H: Tensor, c_H: Tensor) -> dict[str, Tensor]:
    hx = torch.cat([h_H, x_H])
    f, i, o = (sigmoid(gates[gate][0] @ hx + gates[gate][1]) for gate in "fio")
    g = tanh(gates["g"][0] @ hx + gates["g"][1])
    c = f * c_H + i * g
    return {"hx": hx, "c_before": c_H, "f": f, "i": i, "g": g, "o": o, "c": c, "h": o * tanh(c)}


def oracle_student(student: LSTMForCausalLM, ids_T: list[int], resets: set[int], dtype: torch.dtype) -> Tensor:
    """logits_TV from the equations in the module docstring of the student, for one sequence."""
    weights = {name: value.detach().to(dtype) for name, value in student.state_dict().items()}
    eps = student.config.layer_norm_eps

    def norm(x: Tensor, prefix: str) -> Tensor:
        centred = x - x.mean()
        scaled = centred / (centred.square().mean() + eps).sqrt()
        return scaled * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]

    gates = [gate_weights(weights, f"model.layers.{n}.lstm") for n in range(L)]
    zero_H = torch.zeros(H, dtype=dtype)
    state = [(zero_H, zero_H) for _ in range(L)]
    logits = []
    for t, token in enumerate(ids_T):
        if t in resets:
            state = [(zero_H, zero_H) for _ in range(L)]
        x = weights["model.embed_tokens.weight"][token]
        x = weights["model.input_projection.weight"] @ x + weights["model.input_projection.bias"]
        for n in range(L):
            step = oracle_step(gates[n], norm(x, f"model.layers.{n}.norm"), *state[n])
            state[n] = (step["h"], step["c"])
            x = x + step["h"]
        z = weights["model.output_projection.weight"] @ norm(x, "model.norm")
        z = z + weights["model.output_projection.bias"]
        logits.append(weights["lm_head.weight"] @ z)
        if student.config.head_bias:
            logits[-1] = logits[-1] + weights["lm_head.bias"]
    return torch.stack(logits)


@pytest.mark.parametrize("head_bias", [False, True])
def test_outputs_follow_the_equations(head_bias):
    student = make_student(head_bias=head_bias)
    ids_BT = random_ids(3, 9)
    reset_BT = torch.zeros(3, 9, dtype=torch.bool)
    reset_BT[0, 4] = reset_BT[1, 0] = reset_BT[1, 4] = reset_BT[2, 8] = True
    resets = [set(row.nonzero().flatten().tolist()) for row in reset_BT]

    def oracle(dtype: torch.dtype) -> Tensor:
        rows = zip(ids_BT.tolist(), resets, strict=True)
        return torch.stack([oracle_student(student, row, marks, dtype) for row, marks in rows])

    exact_BTV = oracle(torch.float64)
    torch.testing.assert_close(student(ids_BT, reset_mask=reset_BT).logits, exact_BTV, **TIGHT)
    allowed = 4 * (oracle(torch.float32).double() - exact_BTV).abs().max()
    logits_BTV = student.float()(ids_BT, reset_mask=reset_BT).logits
    assert (logits_BTV.double() - exact_BTV).abs().max() <= allowed


def test_lstm_gradients_follow_the_chain_rule_by_hand():
    """Backward through f, i, g, o and c derived on paper, for one sequence, against autograd."""
    T = 7
    lstm = make_student().model.layers[0].lstm
    x_TH = random_like(torch.empty(T, H, dtype=torch.float64), 3).requires_grad_()
    h0_H = random_like(x_TH[0], 4).requires_grad_()
    c0_H = random_like(x_TH[0], 5).requires_grad_()
    out_1TH, (hT_11H, cT_11H) = lstm(x_TH[None], (h0_H[None, None], c0_H[None, None]))
    d_out_TH, d_hT_H, d_cT_H = random_like(x_TH, 6), random_like(h0_H, 7), random_like(h0_H, 8)
    (out_1TH[0] * d_out_TH).sum().add((hT_11H * d_hT_H).sum()).add((cT_11H * d_cT_H).sum()).backward()

    gates = gate_weights({f"l.{name}": p.detach() for name, p in lstm.named_parameters()}, "l")
    steps: list[dict[str, Tensor]] = []
    for t in range(T):
        h, c = (steps[-1]["h"], steps[-1]["c"]) if steps else (h0_H.detach(), c0_H.detach())
        steps.append(oracle_step(gates, x_TH[t].detach(), h, c))
    d_W = {gate: torch.zeros(H, 2 * H, dtype=torch.float64) for gate in "ifgo"}
    d_b = {gate: torch.zeros(H, dtype=torch.float64) for gate in "ifgo"}
    d_x_TH = torch.zeros(T, H, dtype=torch.float64)
    dh, dc = d_hT_H.clone(), d_cT_H.clone()
    for t in reversed(range(T)):
        s = steps[t]
        dh = dh + d_out_TH[t]
        do = dh * tanh(s["c"])
        dc = dc + dh * s["o"] * (1 - tanh(s["c"]) ** 2)
        df, di, dg = dc * s["c_before"], dc * s["g"], dc * s["i"]
        before_activation = {
            "o": do * s["o"] * (1 - s["o"]),
            "f": df * s["f"] * (1 - s["f"]),
            "i": di * s["i"] * (1 - s["i"]),
            "g": dg * (1 - s["g"] ** 2),
        }
        d_hx = torch.zeros(2 * H, dtype=torch.float64)
        for gate, da in before_activation.items():
            d_W[gate] += torch.outer(da, s["hx"])
            d_b[gate] += da
            d_hx += gates[gate][0].T @ da
        dh, d_x_TH[t], dc = d_hx[:H], d_hx[H:], dc * s["f"]

    for actual, expected in [
        (lstm.weight_hh_l0.grad, torch.cat([d_W[gate][:, :H] for gate in "ifgo"])),
        (lstm.weight_ih_l0.grad, torch.cat([d_W[gate][:, H:] for gate in "ifgo"])),
        (lstm.bias_ih_l0.grad, torch.cat([d_b[gate] for gate in "ifgo"])),
        (lstm.bias_hh_l0.grad, torch.cat([d_b[gate] for gate in "ifgo"])),
        (x_TH.grad, d_x_TH),
        (h0_H.grad, dh),
        (c0_H.grad, dc),
    ]:
        torch.testing.assert_close(actual, expected, **TIGHT)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_with_state_equal_the_whole(chunk):
    student = make_student()
    ids_BT = random_ids(2, 10)
    whole = student(ids_BT)
    cache, logits = LSTMCache(), []
    for ids_Bt in ids_BT.split(chunk, dim=1):
        logits.append(student(ids_Bt, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **TIGHT)
    torch.testing.assert_close(cache.h_LBH, whole.past_key_values.h_LBH, **TIGHT)
    torch.testing.assert_close(cache.c_LBH, whole.past_key_values.c_LBH, **TIGHT)
    assert cache.get_seq_length() == 10 and cache.h_LBH.shape == cache.c_LBH.shape == (L, 2, H)


def test_gradient_flows_through_a_carried_state_unless_detached():
    student = make_student().train()
    ids_BT = random_ids(2, 6)
    weight_BTV = random_like(student(ids_BT).logits)

    def gradients(detach: bool) -> dict[str, Tensor]:
        student.zero_grad()
        first = student(ids_BT[:, :3], use_cache=True)
        cache = first.past_key_values.detach() if detach else first.past_key_values
        second = student(ids_BT[:, 3:], past_key_values=cache)
        (torch.cat([first.logits, second.logits], dim=1) * weight_BTV).sum().backward()
        return {name: p.grad.clone() for name, p in student.named_parameters()}

    carried, cut = gradients(detach=False), gradients(detach=True)
    student.zero_grad()
    (student(ids_BT).logits * weight_BTV).sum().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(carried[name], parameter.grad, **TIGHT)
    assert not torch.allclose(cut["model.embed_tokens.weight"], carried["model.embed_tokens.weight"])


def test_cache_selects_repeats_and_resets():
    student = make_student()
    cache = student(random_ids(3, 4)).past_key_values
    h_LBH = cache.h_LBH
    snapshot = copy.copy(cache)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.h_LBH, h_LBH[:, [2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.h_LBH, h_LBH[:, [2, 2, 0, 0]])
    cache.reorder_cache(torch.tensor([3, 0]))
    assert torch.equal(cache.h_LBH, h_LBH[:, [0, 2]])
    cache.reset()
    assert cache.h_LBH is None and cache.get_seq_length() == 0
    student(random_ids(3, 2), past_key_values=snapshot)
    assert snapshot.get_seq_length() == 6 and not torch.equal(snapshot.h_LBH, h_LBH)


def test_state_is_returned_only_when_wanted():
    student = make_student()
    ids_BT = random_ids(2, 3)
    assert student(ids_BT).past_key_values is not None
    assert student(ids_BT, use_cache=False).past_key_values is None
    student.train()
    assert student(ids_BT).past_key_values is None
    cache = LSTMCache()
    assert student(ids_BT, past_key_values=cache).past_key_values is cache


def test_autocast_trains_and_carries_its_state():
    student = make_student(dtype=torch.float32, recurrent_dropout=0.3, output_dropout=0.1).train()
    ids_BT = random_ids(2, 6)
    reset_BT = torch.zeros(2, 6, dtype=torch.bool)
    reset_BT[1, 3] = True
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(ids_BT, labels=ids_BT, reset_mask=reset_BT).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in student.parameters())

    student.eval()
    with torch.no_grad():
        exact_BTV = student(ids_BT).logits
        cache, logits = LSTMCache(), []
        for t in range(6):  # in and out of autocast: the state changes its dtype on the way
            with torch.autocast("cpu", torch.bfloat16, enabled=t != 3):
                logits.append(student(ids_BT[:, t : t + 1], past_key_values=cache).logits.float())
    assert (torch.cat(logits, dim=1) - exact_BTV).abs().max() < 0.03 * exact_BTV.abs().max()  # bf16: 8 bits


def test_no_position_sees_a_later_one():
    student = make_student()
    T = 6
    embedded_BTd = student.get_input_embeddings()(random_ids(1, T)).detach().requires_grad_()
    z_BTd = student.model(inputs_embeds=embedded_BTd).last_hidden_state
    weight_d = random_like(z_BTd[0, 0])
    for t in range(T):
        (gradient_BTd,) = torch.autograd.grad(z_BTd[0, t] @ weight_d, embedded_BTd, retain_graph=True)
        assert gradient_BTd[0, t + 1 :].count_nonzero() == 0
        assert (gradient_BTd[0, : t + 1].abs().sum(dim=-1) > 0).all()


# ---------------------------------------------------------------- resets and padding

DOCUMENTS = [[3, 1, 4], [1, 5, 2]]  # lengths of the documents packed into each row


def packed_rows() -> tuple[Tensor, Tensor, list[list[slice]]]:
    ids_BT = random_ids(2, 8)
    reset_BT = torch.zeros(2, 8, dtype=torch.bool)
    spans = []
    for row, lengths in enumerate(DOCUMENTS):
        ends = list(itertools.accumulate(lengths))
        spans.append([slice(end - length, end) for end, length in zip(ends, lengths, strict=True)])
        reset_BT[row, [span.start for span in spans[-1]]] = True
    return ids_BT, reset_BT, spans


def test_packed_documents_equal_documents_alone():
    student = make_student()
    ids_BT, reset_BT, spans = packed_rows()
    logits_BTV = student(ids_BT, reset_mask=reset_BT).logits
    weight_BTV = random_like(logits_BTV)
    (logits_BTV * weight_BTV).sum().backward()
    packed = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            alone_1TV = student(ids_BT[row : row + 1, span]).logits
            torch.testing.assert_close(logits_BTV[row, span], alone_1TV[0], **TIGHT)
            (alone_1TV[0] * weight_BTV[row, span]).sum().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, **TIGHT)


def test_no_gradient_reaches_another_document():
    student = make_student()
    ids_BT, reset_BT, spans = packed_rows()
    embedded_BTd = student.get_input_embeddings()(ids_BT).detach().requires_grad_()
    z_BTd = student.model(inputs_embeds=embedded_BTd, reset_mask=reset_BT).last_hidden_state
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            loss = (z_BTd[row, span] ** 2).sum()
            (gradient_BTd,) = torch.autograd.grad(loss, embedded_BTd, retain_graph=True)
            assert (gradient_BTd[row, span] != 0).any(dim=-1).all()
            gradient_BTd[row, span] = 0
            assert gradient_BTd.count_nonzero() == 0


def test_a_reset_at_the_first_position_drops_the_incoming_state():
    student = make_student()
    past_BT, ids_BT = random_ids(2, 5), random_ids(2, 4, seed=9)
    reset_BT = torch.zeros(2, 4, dtype=torch.bool)
    reset_BT[0, 0] = True
    cache = student(past_BT).past_key_values
    cache.h_LBH[:, 0] = torch.inf  # would show as NaN if it were multiplied away instead of dropped
    logits_BTV = student(ids_BT, past_key_values=cache, reset_mask=reset_BT).logits
    carried_BTV = student(torch.cat([past_BT, ids_BT], dim=1)).logits[:, 5:]
    torch.testing.assert_close(logits_BTV[0], student(ids_BT).logits[0], **TIGHT)
    torch.testing.assert_close(logits_BTV[1], carried_BTV[1], **TIGHT)


def test_one_run_forgets_in_the_middle(monkeypatch: pytest.MonkeyPatch):
    """T positions, and a step more for each reset after the first position of the row with most of them."""
    student, lstm, calls = make_student(), torch.lstm, []
    student.model.layers[0].lstm.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    student.model.layers = student.model.layers[:1]

    def watched(input_SBI, *arguments):
        calls.append(input_SBI.shape[0])
        return lstm(input_SBI, *arguments)

    monkeypatch.setattr(torch, "lstm", watched)
    ids_BT, reset_BT, _ = packed_rows()  # documents begin at 0, 3, 4 in one row and at 0, 1, 6 in the other
    first_only_BT = torch.zeros_like(reset_BT)
    first_only_BT[:, 0] = True
    for mask, expected in [(None, 8), (torch.zeros_like(reset_BT), 8), (first_only_BT, 8), (reset_BT, 8 + 2)]:
        calls.clear()
        student(ids_BT, reset_mask=mask)
        assert calls == [expected]


def test_picked_rows_are_those_of_an_index_and_so_are_their_gradients():
    """Row 1 goes nowhere, and place 2 is of no row."""
    x_nH = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    source_m, place_n = torch.tensor([3, 0, 4, 2]), torch.tensor([1, 4, 3, 0])
    padded_nH = torch.cat([x_nH, torch.zeros(1, 3)])
    picked_mH = Rows.apply(x_nH, source_m, place_n)
    assert picked_mH.equal(padded_nH[source_m])
    weight_mH = torch.randn(4, 3, dtype=torch.float64)
    found, expected = (torch.autograd.grad(y, x_nH, weight_mH)[0] for y in (picked_mH, padded_nH[source_m]))
    assert found.equal(expected)
    assert torch.autograd.gradgradcheck(lambda x: Rows.apply(x, source_m, place_n) ** 2, x_nH)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_state_after_several_documents_is_that_of_the_last_one(bf16: bool):
    """In rows with no reset, one, and two: the shorter ones hold their state while the others go on."""
    student = make_student()
    ids_BT, reset_BT = random_ids(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    reset_BT[1, 5] = reset_BT[2, 2] = reset_BT[2, 3] = True
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if bf16 else TIGHT
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = student(ids_BT, reset_mask=reset_BT).past_key_values
        for row, begin in enumerate((0, 5, 3)):
            alone = student(ids_BT[row : row + 1, begin:]).past_key_values
            torch.testing.assert_close(found.h_LBH[:, row], alone.h_LBH[:, 0], **tolerance)
            torch.testing.assert_close(found.c_LBH[:, row], alone.c_LBH[:, 0], **tolerance)


LENGTHS = [2, 6, 3]  # real tokens per row of the left-padded batch


def padded_prompts() -> tuple[Tensor, Tensor]:
    ids_BT = random_ids(3, 6)  # the padding, too, is random: no row may notice
    mask_BT = torch.stack([torch.arange(6) >= 6 - length for length in LENGTHS]).long()
    return ids_BT, mask_BT


def test_left_padded_batch_gives_the_logits_of_single_prompts():
    student = make_student()
    ids_BT, mask_BT = padded_prompts()
    output = student(ids_BT, attention_mask=mask_BT)
    for row, length in enumerate(LENGTHS):
        single = student(ids_BT[row : row + 1, -length:])
        torch.testing.assert_close(output.logits[row, -length:], single.logits[0], **TIGHT)
        torch.testing.assert_close(output.past_key_values.c_LBH[:, row], single.past_key_values.c_LBH[:, 0], **TIGHT)
    packed = student(ids_BT, reset_mask=mask_BT.bool() & ~F.pad(mask_BT, (1, -1), value=1).bool()).logits
    assert torch.equal(packed, output.logits)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "top_k": 1},
    ],
    ids=["greedy", "beam", "two beams", "sampling"],
)
def test_left_padded_batch_generates_what_single_prompts_do(options):
    student = make_student(pad_token_id=0)
    ids_BT, mask_BT = padded_prompts()
    options = options | {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    options |= {"output_scores": True}
    together = student.generate(ids_BT, attention_mask=mask_BT, **options)
    assert len(set(map(tuple, together.sequences[:, 6:].tolist()))) == len(together.sequences)
    for row, length in enumerate(LENGTHS):
        alone = student.generate(ids_BT[row : row + 1, -length:], **options)
        rows = slice(row * len(alone.sequences), (row + 1) * len(alone.sequences))
        assert torch.equal(together.sequences[rows, 6:], alone.sequences[:, length:])
        if "num_beams" in options:
            torch.testing.assert_close(together.sequences_scores[rows], alone.sequences_scores)
        else:
            torch.testing.assert_close(torch.stack(together.logits)[:, rows], torch.stack(alone.logits))


@pytest.mark.parametrize("cell", ["lstm", "gru", "ln_lstm"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 3}], ids=["greedy", "sampling"])
def test_a_bf16_student_generates_from_its_own_distribution(cell, options):
    """Step by step, behind padding; the oracle reads each row alone, whole, and in fp32."""
    student = make_student(pad_token_id=0, cell=cell, dtype=torch.bfloat16)
    exact = make_student(pad_token_id=0, cell=cell, dtype=torch.float32)
    exact.load_state_dict(student.state_dict())  # the rounded weights
    ids_BT, mask_BT = padded_prompts()
    torch.manual_seed(0)
    written = student.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **options
    )
    assert all(part.dtype == torch.bfloat16 for part in written.past_key_values.state)
    for row, length in enumerate(LENGTHS):
        text_T = written.sequences[row, 6 - length :]
        exact_tV = exact(text_T[None]).logits[0, length - 1 : -1]
        found_tV = torch.stack(written.logits)[:, row].float()
        slack = 0.03 * exact_tV.abs().max()  # 8 bits
        assert (found_tV - exact_tV).abs().max() < slack
        rank = 3 if options["do_sample"] else 1
        chosen_t = exact_tV.gather(1, text_T[length:, None])[:, 0]
        assert (chosen_t >= exact_tV.topk(rank).values[:, -1] - 2 * slack).all()
    if not options["do_sample"]:
        assert torch.equal(torch.stack(written.logits).argmax(-1).T, written.sequences[:, 6:])


def test_chunked_prefill_finds_a_row_that_begins_in_a_later_chunk():
    student = make_student(pad_token_id=0)
    ids_BT, mask_BT = padded_prompts()
    options = {"attention_mask": mask_BT, "max_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    whole = student.generate(ids_BT, **options)
    for chunk in (1, 2, 4):
        chunked = student.generate(ids_BT, past_key_values=LSTMCache(), prefill_chunk_size=chunk, **options)
        torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits))
        assert torch.equal(chunked.sequences, whole.sequences)


def test_right_padding_is_refused_where_it_would_reach_the_state():
    student = make_student(pad_token_id=0)
    ids_BT = random_ids(2, 5)
    right_BT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    hole_BT = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="pad on the left"):
        student(ids_BT, attention_mask=right_BT)
    with pytest.raises(ValueError, match="pad on the left"):
        student.generate(ids_BT, attention_mask=right_BT, max_new_tokens=2)
    logits_BTV = student(ids_BT, attention_mask=right_BT, use_cache=False).logits
    torch.testing.assert_close(logits_BTV[0, :3], student(ids_BT).logits[0, :3], **TIGHT)
    with pytest.raises(ValueError, match="between real tokens"):
        student(ids_BT, attention_mask=hole_BT, use_cache=False)
    cache = student(ids_BT).past_key_values  # padding between a turn already read and the next one
    with pytest.raises(ValueError, match="pad on the left"):
        student(ids_BT[:, :2], attention_mask=F.pad(hole_BT[:, :3], (4, 0), value=1)[:, :7], past_key_values=cache)
    with pytest.raises(ValueError, match=r"\(B, at least 5\)"):
        student(ids_BT, attention_mask=right_BT[:, :4])


# ---------------------------------------------------------------- generation


def test_generation_reads_each_token_once():
    student = make_student(pad_token_id=0)
    reads: list[int] = []
    student.model.embed_tokens.register_forward_hook(lambda module, args, output: reads.append(args[0].shape[1]))
    ids_BT, mask_BT = padded_prompts()
    for options in (
        {},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"attention_mask": mask_BT},
    ):
        reads.clear()
        student.generate(ids_BT, max_new_tokens=4, **options)
        assert reads == [6, 1, 1, 1]


def test_greedy_generation_is_a_loop_of_argmax():
    student = make_student()
    ids_BT = random_ids(2, 4)
    generated = student.generate(ids_BT, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        next_B = student(ids_BT, use_cache=False).logits[:, -1].argmax(dim=-1)
        ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
    assert torch.equal(generated, ids_BT)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3}, {"num_return_sequences": 2, "use_cache": False}])
def test_every_sampled_sequence_was_drawn_from_its_own_logits(options):
    student = make_student()
    ids_BT = random_ids(2, 4)
    torch.manual_seed(0)
    output = student.generate(
        ids_BT, max_new_tokens=6, do_sample=True, output_logits=True, return_dict_in_generate=True, **options
    )
    assert output.sequences.shape == (2 * options["num_return_sequences"], 10)
    assert len(set(map(tuple, output.sequences.tolist()))) == len(output.sequences)
    reread_BTV = student(output.sequences, use_cache=False).logits[:, 3:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1).double(), reread_BTV, rtol=0, atol=1e-5)


def plain_beam_search(
    student: LSTMForCausalLM, prompt: list[int], width: int, steps: int
) -> list[tuple[float, list[int]]]:
    """Beam search that rereads everything: no state to carry, nothing to reorder."""
    beams = [(0.0, prompt)]
    for _ in range(steps):
        candidates = []
        for score, ids in beams:
            log_probs_V = student(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1).tolist()
            candidates += [(score + log_prob, [*ids, token]) for token, log_prob in enumerate(log_probs_V)]
        beams = sorted(candidates, reverse=True)[:width]
    return beams


def test_beam_search_is_a_plain_beam_search():
    student = make_student()
    for seed in range(4):
        ids_1T = random_ids(1, 3, seed=seed)
        generated = student.generate(ids_1T, max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=False)
        assert generated.tolist() == [ids for _, ids in plain_beam_search(student, ids_1T[0].tolist(), 3, 6)]


def test_a_beam_as_wide_as_the_tree_finds_the_best_sequence():
    student = make_student(seed=0, vocab_size=3)
    prompt = [0, 1, 2]
    sequences = torch.tensor([prompt + list(tail) for tail in itertools.product(range(3), repeat=4)])
    log_probs_BTV = student(sequences).logits[:, 2:-1].log_softmax(dim=-1)
    total_B = log_probs_BTV.gather(2, sequences[:, 3:, None]).sum(dim=(1, 2))
    generated = student.generate(torch.tensor([prompt]), max_new_tokens=4, num_beams=27, do_sample=False)
    assert generated[0].tolist() == sequences[total_B.argmax()].tolist()
    greedy = student.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    assert greedy[0].tolist() != generated[0].tolist()  # else the search had nothing to find


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_bias", [False, True])
def test_saving_and_loading_keeps_every_bit(tmp_path, tied, head_bias):
    student = make_student(dtype=torch.float32, tie_word_embeddings=tied, head_bias=head_bias)
    student.tie_weights()
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    student.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = LSTMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == student.config.to_diff_dict()
    assert loaded.state_dict().keys() == student.state_dict().keys()
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids_BT = random_ids(2, 5)
    assert torch.equal(loaded(ids_BT).logits, student(ids_BT).logits)
    z_BTd = LSTMModel.from_pretrained(tmp_path)(ids_BT).last_hidden_state
    assert torch.equal(z_BTd, student.model(ids_BT).last_hidden_state)


def test_a_matrix_missing_from_a_file_is_drawn_afresh_and_its_neighbours_are_loaded():
    student = make_student(dtype=torch.float32)
    missing = "model.layers.1.lstm.weight_ih_l0"
    weights = {name: value.clone() for name, value in student.state_dict().items() if name != missing}
    loaded = LSTMForCausalLM.from_pretrained(None, config=student.config, state_dict=weights).state_dict()
    assert all(torch.equal(loaded[name], student.state_dict()[name]) for name in weights)
    assert loaded[missing].std() > 0.05 and not torch.equal(loaded[missing], student.state_dict()[missing])


def test_auto_classes_know_the_student(tmp_path):
    student = make_student(dtype=torch.bfloat16)
    student.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LSTMConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LSTMForCausalLM and loaded.dtype == torch.bfloat16
    assert type(AutoModelForCausalLM.from_config(student.config)) is LSTMForCausalLM


STRANGER = """
from transformers import AutoModelForCausalLM

for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(f"{name}/student", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = torch.tensor([[1, 2, 3]])
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)), f"{name}/output.pt")
    model.save_pretrained(f"{name}/again")
"""
STRANGE = {"plain": {}, "other": {"cell": "ln_lstm", "attention_window": 3, "feed_forward_size": 5}}


def test_a_stranger_loads_the_folder_without_this_package(tmp_path):
    students = {name: make_student(dtype=torch.float32, **fields) for name, fields in STRANGE.items()}
    for name, student in students.items():
        student.save_pretrained(tmp_path / name / "student")
    auto_map = json.loads((tmp_path / "plain/student/config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "student.LSTMConfig", "AutoModelForCausalLM": "student.LSTMForCausalLM"}
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    run = run_stranger(STRANGER, *students, cwd=tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    code = (Path(__file__).parent.parent / "distill/student.py").read_bytes()
    for name, student in students.items():
        logits_BTV, generated = torch.load(tmp_path / name / "output.pt")
        ids_BT = torch.tensor([[1, 2, 3]])
        torch.testing.assert_close(logits_BTV, student(ids_BT).logits)
        assert torch.equal(generated, student.generate(ids_BT, max_new_tokens=5, do_sample=False))
        files = [tmp_path / name / folder / "student.py" for folder in ("student", "again")]
        assert files[0].read_bytes() == files[1].read_bytes() == code


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_can_grow(tied):
    student = make_student(tie_word_embeddings=tied, head_bias=True)
    student.tie_weights()
    ids_BT = random_ids(2, 5)
    before_BTV = student(ids_BT).logits
    student.resize_token_embeddings(V + 3)
    after_BTV = student(ids_BT).logits
    assert after_BTV.shape[-1] == student.config.vocab_size == student.lm_head.bias.shape[0] == V + 3
    torch.testing.assert_close(after_BTV[..., :V], before_BTV, **TIGHT)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


# ---------------------------------------------------------------- dropout


def test_dropouts_do_nothing_outside_training():
    ids_BT = random_ids(2, 6)
    student = make_student(input_dropout=0.5, output_dropout=0.5, recurrent_dropout=0.5)
    assert torch.equal(student(ids_BT).logits, make_student()(ids_BT).logits)
    student.train()
    assert not torch.equal(student(ids_BT).logits, student(ids_BT).logits)


def test_input_and_output_dropout_act_where_they_are_said_to():
    student = make_student(input_dropout=0.25, output_dropout=0.4).train()
    seen: dict[str, Tensor] = {}
    for name, module in student.model.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.update(
                {
                    f"{name} in": args[0] if args else None,
                    f"{name} out": output[0] if isinstance(output, tuple) else output,
                }
            )
        )
    torch.manual_seed(0)
    student(random_ids(4, 16))
    first, second = "layers.0", "layers.1"
    for actual, undropped, probability in [
        (seen[f"{first} in"], seen["input_projection out"], 0.25),
        (seen[f"{first} out"] - seen[f"{first} in"], seen[f"{first}.lstm out"], 0.4),
        (seen[f"{second} out"] - seen[f"{second} in"], seen[f"{second}.lstm out"], 0.4),
    ]:
        kept = actual.abs() > 1e-9
        torch.testing.assert_close(actual, kept * undropped / (1 - probability), **TIGHT)
        deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
        assert abs(1 - kept.double().mean() - probability) < 4 * deviation


def test_recurrent_dropout_drops_recurrent_weights_once_per_call():
    """Which weights were kept shows in the gradient; a student with just these, scaled, must agree."""
    probability = 0.4
    student = make_student(recurrent_dropout=probability).train()
    ids_BT, reset_BT, _ = packed_rows()
    torch.manual_seed(0)
    logits_BTV = student(ids_BT, reset_mask=reset_BT).logits
    weight_BTV = random_like(logits_BTV)
    (logits_BTV * weight_BTV).sum().backward()

    plain = make_student()
    masks = []
    for block, plain_block in zip(student.model.layers, plain.model.layers, strict=True):
        masks.append(block.lstm.weight_hh_l0.grad != 0)
        plain_block.lstm.weight_hh_l0.data *= masks[-1].double() / (1 - probability)
    plain_logits_BTV = plain(ids_BT, reset_mask=reset_BT).logits
    torch.testing.assert_close(logits_BTV, plain_logits_BTV, **TIGHT)
    (plain_logits_BTV * weight_BTV).sum().backward()
    for (name, parameter), expected in zip(student.named_parameters(), plain.parameters(), strict=True):
        if "weight_hh" in name:
            mask = masks[int(name.split(".")[2])]
            torch.testing.assert_close(parameter.grad, expected.grad * mask / (1 - probability), **TIGHT)
        else:
            torch.testing.assert_close(parameter.grad, expected.grad, **TIGHT)

    deviation = (probability * (1 - probability) / (L * 4 * H * H)) ** 0.5
    assert abs(1 - torch.stack(masks).double().mean() - probability) < 4 * deviation
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(student(ids_BT).logits, student(ids_BT).logits)  # a new mask for each call


# ---------------------------------------------------------------- the rest of the interface


def test_labels_are_shifted_inside():
    student = make_student()
    ids_BT = random_ids(2, 6)
    labels_BT = ids_BT.clone()
    labels_BT[0, 2] = -100
    output = student(ids_BT, labels=labels_BT)
    losses = [
        -output.logits[b, t].log_softmax(dim=-1)[ids_BT[b, t + 1]]
        for b in range(2)
        for t in range(5)
        if (b, t + 1) != (0, 2)
    ]
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_forward_accepts_what_the_library_passes():
    student = make_student()
    ids_BT = random_ids(2, 6)
    logits_BTV = student(ids_BT).logits
    embedded_BTd = student.get_input_embeddings()(ids_BT)
    assert torch.equal(student(inputs_embeds=embedded_BTd, position_ids=torch.arange(6)[None]).logits, logits_BTV)
    torch.testing.assert_close(student(ids_BT, logits_to_keep=2).logits, logits_BTV[:, -2:], **TIGHT)
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(student(ids_BT, logits_to_keep=kept).logits, logits_BTV[:, kept], **TIGHT)
    logits, cache = student(ids_BT, return_dict=False)
    assert torch.equal(logits, logits_BTV) and isinstance(cache, LSTMCache)
    generated = student.generate(inputs_embeds=embedded_BTd, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, student.generate(ids_BT, max_new_tokens=4, do_sample=False)[:, 6:])


def test_forward_refuses_what_it_cannot_use():
    student = make_student()
    ids_BT = random_ids(2, 6)
    with pytest.raises(ValueError, match="exactly one"):
        student()
    with pytest.raises(ValueError, match="exactly one"):
        student(ids_BT, inputs_embeds=student.get_input_embeddings()(ids_BT))
    with pytest.raises(ValueError, match=r"reset_mask must be torch.bool \(2, 6\)"):
        student(ids_BT, reset_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"found torch.int64"):
        student(ids_BT, reset_mask=torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="gradient checkpointing"):
        student.gradient_checkpointing_enable()


def test_fresh_weights():
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "embedding_size": 40, "hidden_size": 32}
    student = LSTMForCausalLM(LSTMConfig(initializer_range=0.1, head_bias=True, pad_token_id=0, **sizes))
    for block in student.model.layers:
        i, f, g, o = block.lstm.bias_ih_l0.chunk(4)
        assert (f == 1).all() and not torch.cat([i, g, o, block.lstm.bias_hh_l0]).any()
        assert block.lstm.weight_hh_l0.std() > 0.05 and block.lstm.weight_ih_l0.std() > 0.05
        assert (block.norm.weight == 1).all() and not block.norm.bias.any()
    for weight in (
        student.lm_head.weight,
        student.model.embed_tokens.weight,
        student.model.input_projection.weight,
    ):
        assert abs(weight.std() / 0.1 - 1) < 0.1
    assert student.model.embed_tokens.weight[0].any()  # padding may be a token that the corpus uses
    student(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    assert student.model.embed_tokens.weight.grad[0].any()
    for layer in (student.lm_head, student.model.input_projection, student.model.output_projection):
        assert not layer.bias.any()


def test_configuration():
    config = LSTMConfig()
    assert (config.embedding_size, config.hidden_size, config.num_layers) == (576, 512, 2)
    assert LSTMConfig(num_hidden_layers=3).num_layers == 3 and config.num_hidden_layers == 2
    wrong = {
        "vocab_size": 0,
        "embedding_size": 2.5,
        "hidden_size": True,
        "num_layers": -1,
        "input_dropout": 1.0,
        "output_dropout": -0.1,
        "recurrent_dropout": "0.5",
        "layer_norm_eps": 0.0,
        "initializer_range": float("nan"),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"LSTMConfig: {name} must be .*, found {value!r}$"):
            LSTMConfig(**{name: value})
    with pytest.raises(ValueError) as error:
        LSTMConfig(**wrong)
    assert all(name in str(error.value) for name in wrong)
