"""Students of other cells, with attention and feed-forward blocks, against a loop over the equations.

    python -m pytest tests/test_cells.py

Shapes in names as in `distill/student.py`. The oracle reads one position of one sequence at a time, in fp64, and
leaves its gradients to autograd.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from test_student import TIGHT, D, H, L, V, make_student, packed_rows, padded_prompts, random_ids, random_like
from torch import Tensor

from distill.student import LSTMCache, LSTMConfig, LSTMForCausalLM, LSTMForSequenceClassification

VARIANTS = [
    {"cell": "gru"},
    {"cell": "ln_lstm"},
    {"attention_window": 3},
    {"feed_forward_size": 5},
    {"cell": "gru", "attention_window": 4, "feed_forward_size": 5, "num_layers": 3},
    {"cell": "ln_lstm", "attention_window": 20, "num_layers": 1},
]
every_variant = pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))


# ---------------------------------------------------------------- the oracle


class Oracle:
    """The equations of the docstrings, with a student's own parameters."""

    def __init__(self, student: LSTMForCausalLM) -> None:
        self.config, self.weights = student.config, dict(student.named_parameters())

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        scaled = centred / (centred.square().mean() + self.config.layer_norm_eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0.0)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0.0)

    def lstm(self, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        w, u, b, e = (self.weights[f"{name}.{part}_l0"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        i, f, g, o = (w @ x + b + u @ h + e).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def gru(self, name: str, x: Tensor, h: Tensor, textbook: bool = False) -> tuple[Tensor]:
        """z says what is new; torch stores the weights of 1 - z.

        As cuDNN has it, r comes after the recurrent product, h~ = tanh(W x + b + r * (U h' + e)); in the textbook
        before it, h~ = tanh(W x + b + U (r * h') + e).
        """
        parts = (
            self.weights[f"{name}.{part}_l0"].chunk(3) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        (w_r, u_r, b_r, e_r), (w_z, u_z, b_z, e_z), (w, u, b, e) = zip(*parts, strict=True)
        r = torch.sigmoid(w_r @ x + b_r + u_r @ h + e_r)
        z = torch.sigmoid(-(w_z @ x + b_z + u_z @ h + e_z))
        new = torch.tanh(w @ x + b + (u @ (r * h) + e if textbook else r * (u @ h + e)))
        return ((1 - z) * h + z * new,)

    def ln_lstm(self, name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        w, u, b = (self.weights[f"{name}.{part}"] for part in ("weight_ih", "weight_hh", "bias"))
        i, f, o, g = (self.norm(w @ x, f"{name}.input_norm") + self.norm(u @ h, f"{name}.recurrent_norm") + b).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm(c, f"{name}.cell_norm").tanh(), c

    def attention(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        """`seen`: m of the document's positions so far; the own one is added."""
        seen.append(self.norm(x, "model.attention.norm"))
        window = seen[-self.config.attention_window :]
        query = self.norm(self.linear(seen[-1], "model.attention.query"), "model.attention.query_norm")
        weights = torch.stack([query @ m for m in window]).div(math.sqrt(H)).softmax(0)
        read = sum(weight * m for weight, m in zip(weights, window, strict=True))
        return x + self.weights["model.attention.value_gate"].sigmoid() * read

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        normed = self.norm(x, f"{name}.norm")
        gate, up = self.linear(normed, f"{name}.gate"), self.linear(normed, f"{name}.up")
        return x + self.linear(gate * gate.sigmoid() * up, f"{name}.down")

    def logits(self, ids_T: list[int], resets: set[int]) -> Tensor:
        """logits_TV of one sequence."""
        cell, layers = getattr(self, self.config.cell), self.config.num_layers
        zero = torch.zeros(H, dtype=torch.float64)
        logits = []
        for t, token in enumerate(ids_T):
            if t == 0 or t in resets:
                state, seen = [(zero,) * (1 if self.config.cell == "gru" else 2)] * layers, []
            x = self.linear(self.weights["model.embed_tokens.weight"][token], "model.input_projection")
            for n in range(layers):
                name = f"model.layers.{n}"
                state[n] = cell(f"{name}.{self.config.cell}", self.norm(x, f"{name}.norm"), *state[n])
                x = x + state[n][0]
                if self.config.feed_forward_size:
                    x = self.feed_forward(x, f"{name}.feed_forward")
                if self.config.attention_window and n == max(layers - 2, 0):
                    x = self.attention(x, seen)
            z = self.linear(self.norm(x, "model.norm"), "model.output_projection")
            logits.append(self.linear(z, "lm_head"))
        return torch.stack(logits)


def gradients(student: LSTMForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("same", [True, False])
def test_the_gru_of_cudnn_is_the_textbooks_where_its_recurrent_matrix_is_diagonal(same):
    """There the order of r and the product does not matter, if nothing is added to the product; else it does."""
    student = make_student(cell="gru")
    gru = student.model.layers[0].gru
    with torch.no_grad():
        if same:
            gru.weight_hh_l0[2 * H :] *= torch.eye(H)
            gru.bias_hh_l0[2 * H :] = 0
    x_TH = torch.randn(5, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def last(textbook: bool) -> Tensor:
        h = torch.zeros(H, dtype=torch.float64)
        for x in x_TH:
            (h,) = Oracle(student).gru("model.layers.0.gru", x, h, textbook)
        return h

    torch.testing.assert_close(gru(x_TH[None])[0][0, -1], last(textbook=False))
    found, textbook = (torch.autograd.grad(last(way).sum(), list(gru.parameters())) for way in (False, True))
    difference = (last(textbook=False) - last(textbook=True)).abs().max()
    if same:
        assert difference < 1e-12
        torch.testing.assert_close(found[0], textbook[0])  # those of U_n and its bias are of other functions
    else:
        assert difference > 1e-3


@every_variant
@pytest.mark.parametrize("resets", [False, True])
def test_values_and_gradients_follow_the_equations(fields, resets):
    student = make_student(**fields)
    ids_BT, reset_BT, _ = packed_rows()
    reset_BT &= resets
    rows = zip(ids_BT.tolist(), reset_BT, strict=True)
    expected_BTV = torch.stack(
        [Oracle(student).logits(ids, set(marks.nonzero()[:, 0].tolist())) for ids, marks in rows]
    )
    logits_BTV = student.train()(ids_BT, reset_mask=reset_BT).logits
    torch.testing.assert_close(logits_BTV, expected_BTV, **TIGHT)
    weight_BTV = random_like(logits_BTV)
    expected = gradients(student, (expected_BTV * weight_BTV).sum())
    assert all(value.any() for value in expected.values())
    assert_same(gradients(student, (logits_BTV * weight_BTV).sum()), expected)


# ---------------------------------------------------------------- state


@every_variant
@pytest.mark.parametrize("chunk", [1, 3])
def test_pieces_with_a_carried_state_are_the_whole(fields, chunk):
    """With resets, values, gradients through the state, and the state at the end."""
    student = make_student(**fields)
    ids_BT, reset_BT, _ = packed_rows()
    reset_BT[0] = False
    whole = student(ids_BT, reset_mask=reset_BT)
    weight_BTV = random_like(whole.logits)
    expected = gradients(student, (whole.logits * weight_BTV).sum())
    cache, logits = LSTMCache(), []
    for ids_Bt, reset_Bt in zip(ids_BT.split(chunk, 1), reset_BT.split(chunk, 1), strict=True):
        logits.append(student(ids_Bt, past_key_values=cache, reset_mask=reset_Bt).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **TIGHT)
    assert len(cache.state) == len(whole.past_key_values.state) == len(student.model.state_names)
    for found, part in zip(cache.state, whole.past_key_values.state, strict=True):
        torch.testing.assert_close(found, part, **TIGHT)
    assert_same(gradients(student, (torch.cat(logits, 1) * weight_BTV).sum()), expected)
    detached = cache.detach()
    assert not any(part.requires_grad for part in detached.state) and cache.state[0].requires_grad


def test_attention_in_stretches_is_attention_at_once(monkeypatch):
    student = make_student(attention_window=4)
    ids_BT, reset_BT, _ = packed_rows()
    whole = student(ids_BT, reset_mask=reset_BT)
    monkeypatch.setattr("distill.student.STRETCH", 3)
    sizes: list[int] = []
    student.model.attention.query.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[1]))
    parts = student(ids_BT, reset_mask=reset_BT)
    assert sizes == [3, 3, 2]
    torch.testing.assert_close(parts.logits, whole.logits, **TIGHT)
    for found, part in zip(parts.past_key_values.state, whole.past_key_values.state, strict=True):
        torch.testing.assert_close(found, part, **TIGHT)


@every_variant
def test_the_state_is_that_of_the_last_document_and_of_constant_size(fields):
    student = make_student(**fields)
    ids_BT, reset_BT, spans = packed_rows()
    packed = student(ids_BT, reset_mask=reset_BT).past_key_values
    for row, row_spans in enumerate(spans):
        alone = student(ids_BT[row : row + 1, row_spans[-1]]).past_key_values
        for found, part in zip(packed.state, alone.state, strict=True):
            torch.testing.assert_close(found[:, row], part[:, 0], **TIGHT)
    layers, window = fields.get("num_layers", L), fields.get("attention_window")
    numbers = layers * H * (1 if fields.get("cell") == "gru" else 2)
    numbers += (window - 1) * (H + 1) if window else 0
    longer = student(random_ids(2, 40)).past_key_values
    assert packed.state_bytes == longer.state_bytes == 2 * 8 * numbers
    assert [part.shape[1] for part in longer.state] == [2] * len(student.model.state_names)


@every_variant
def test_the_cache_goes_back_selects_and_repeats(fields):
    student = make_student(**fields)
    ids_BT = random_ids(3, 12)
    with torch.no_grad():
        cache = LSTMCache()
        for ids_Bt in ids_BT.split([4, 5, 1, 2], 1):
            student(ids_Bt, past_key_values=cache)
        for crop, keep in ((-1, 11), (-2, 9), (-3, 6), (2, 2)):
            cache.crop(crop)
            expected = student(ids_BT[:, :keep]).past_key_values
            assert cache.get_seq_length() == keep
            for found, part in zip(cache.state, expected.state, strict=True):
                torch.testing.assert_close(found, part, **TIGHT)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        found_BTV = student(ids_BT[rows, 2:], past_key_values=cache).logits
        torch.testing.assert_close(found_BTV, student(ids_BT).logits[rows, 2:], **TIGHT)


@every_variant
def test_no_gradient_and_no_value_reaches_another_document(fields):
    student = make_student(**fields)
    ids_BT, reset_BT, spans = packed_rows()
    embedded_BTd = student.get_input_embeddings()(ids_BT).detach().requires_grad_()
    z_BTd = student.model(inputs_embeds=embedded_BTd, reset_mask=reset_BT).last_hidden_state
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            (gradient_BTd,) = torch.autograd.grad((z_BTd[row, span] ** 2).sum(), embedded_BTd, retain_graph=True)
            assert (gradient_BTd[row, span] != 0).any(-1).all()
            gradient_BTd[row, span] = 0
            assert gradient_BTd.count_nonzero() == 0


@every_variant
def test_left_padding_is_not_seen(fields):
    student = make_student(pad_token_id=0, **fields)
    ids_BT, mask_BT = padded_prompts()
    with torch.no_grad():
        output = student(ids_BT, attention_mask=mask_BT)
        options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
        together = student.generate(ids_BT, attention_mask=mask_BT, **options)
        for row, length in enumerate(mask_BT.sum(1).tolist()):
            prompt_1T = ids_BT[row : row + 1, -length:]
            single = student(prompt_1T)
            torch.testing.assert_close(output.logits[row, -length:], single.logits[0], **TIGHT)
            for found, part in zip(output.past_key_values.state, single.past_key_values.state, strict=True):
                torch.testing.assert_close(found[:, row], part[:, 0], **TIGHT)
            assert torch.equal(together[row, 6:], student.generate(prompt_1T, **options)[0, length:])


@every_variant
def test_a_classifier_does_not_see_padding_on_either_side(fields):
    sizes = {"vocab_size": V, "embedding_size": D, "hidden_size": H, "num_labels": 3, "pad_token_id": 0}
    classifier = LSTMForSequenceClassification(LSTMConfig(**(sizes | fields))).double().eval()
    classifier.model.load_state_dict(make_student(**fields).model.state_dict())
    left_BT, mask_BT = padded_prompts()
    lengths = mask_BT.sum(1).tolist()
    right_BT = torch.stack([ids.roll(length) for ids, length in zip(left_BT, lengths, strict=True)])
    left_BC = classifier(left_BT, attention_mask=mask_BT).logits
    right_BC = classifier(right_BT, attention_mask=mask_BT.flip(1)).logits
    for row, length in enumerate(lengths):
        alone_C = classifier(left_BT[row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(left_BC[row], alone_C, **TIGHT)
        torch.testing.assert_close(right_BC[row], alone_C, **TIGHT)


@every_variant
def test_greedy_generation_with_an_assistant_is_a_loop(fields):
    """The assistant's cache is rewound, and so is the target's."""
    student, assistant = make_student(**fields), make_student(seed=3, **fields)
    ids_1T = expected_1T = random_ids(1, 4)
    with torch.no_grad():
        for _ in range(6):
            next_1 = student(expected_1T, use_cache=False).logits[:, -1].argmax(-1)
            expected_1T = torch.cat([expected_1T, next_1[:, None]], 1)
    for options in ({}, {"assistant_model": assistant}):
        assert torch.equal(student.generate(ids_1T, max_new_tokens=6, do_sample=False, **options), expected_1T)


@every_variant
def test_autocast_trains_and_carries_its_state(fields):
    student = make_student(dtype=torch.float32, recurrent_dropout=0.3, output_dropout=0.1, **fields).train()
    ids_BT, reset_BT, spans = packed_rows()
    with torch.autocast("cpu", torch.bfloat16):
        student(ids_BT, labels=ids_BT, reset_mask=reset_BT).loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in student.parameters())
    student.eval()
    with torch.no_grad():
        exact_BTV, cache, logits = student(ids_BT, reset_mask=reset_BT).logits, LSTMCache(), []
        for t in range(8):  # in and out of autocast: the state changes its dtype on the way
            with torch.autocast("cpu", torch.bfloat16, enabled=t != 3):
                step = student(ids_BT[:, t : t + 1], past_key_values=cache, reset_mask=reset_BT[:, t : t + 1])
            logits.append(step.logits.float())
    assert (torch.cat(logits, 1) - exact_BTV).abs().max() < 0.1 * exact_BTV.abs().max()  # bf16: 8 bits


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("cell", ["gru", "ln_lstm"])
def test_recurrent_weights_are_dropped_once_a_call(cell):
    """Which were kept shows in the gradient; a student with just these, scaled, must agree."""
    student, plain = make_student(cell=cell, recurrent_dropout=0.4).train(), make_student(cell=cell)
    ids_BT, reset_BT, _ = packed_rows()
    logits_BTV = student(ids_BT, reset_mask=reset_BT).logits
    logits_BTV.square().sum().backward()
    for block, plain_block in zip(student.model.layers, plain.model.layers, strict=True):
        weights = [
            next(p for name, p in b.cell.named_parameters() if "weight_hh" in name) for b in (block, plain_block)
        ]
        kept = weights[0].grad != 0
        assert 0.5 < kept.double().mean() < 0.7
        weights[1].data *= kept.double() / 0.6
    torch.testing.assert_close(logits_BTV, plain(ids_BT, reset_mask=reset_BT).logits, **TIGHT)


def masks_of(student: LSTMForCausalLM, ids_BT: Tensor) -> list[Tensor]:
    """(what came out / what went in) of every Dropout, in order."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: found.append(output / inputs[0]))
        for name, module in student.model.named_modules()
        if name.endswith("dropout")
    ]
    student(ids_BT)
    for hook in hooks:
        hook.remove()
    return found


def test_variational_masks_are_the_same_at_all_positions():
    fields = {"input_dropout": 0.25, "output_dropout": 0.25, "attention_window": 3, "feed_forward_size": 5}
    for locked in (False, True):
        student = make_student(variational_dropout=locked, **fields).train()
        masks = masks_of(student, random_ids(40, 6))
        assert len(masks) == 1 + L + L + 1  # input, cells, feed-forward blocks, attention
        for mask_BTH in masks:
            kept = mask_BTH.abs() > 1e-9
            torch.testing.assert_close(mask_BTH, kept.double() / 0.75, **TIGHT)
            assert (kept == kept[:, :1]).all() == locked
            assert abs(kept[:, 0].double().mean() - 0.75) < 4 * (0.25 * 0.75 / (40 * H)) ** 0.5
        assert all((mask_BTH == 1).all() for mask_BTH in masks_of(student.eval(), random_ids(2, 6)))


def test_embedding_dropout_drops_words_wherever_they_stand():
    student = make_student(embedding_dropout=0.4, embedding_size=D).train()
    ids_BT = torch.arange(V).repeat(3, 2)
    seen: list[Tensor] = []
    student.model.input_projection.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    student(ids_BT)
    rows_BTd = student.model.embed_tokens.weight[ids_BT]
    kept_BT = (seen[0] / rows_BTd).mean(-1) * 0.6
    torch.testing.assert_close(seen[0], rows_BTd * kept_BT[..., None] / 0.6, **TIGHT)
    kept_V = kept_BT[0, :V]
    torch.testing.assert_close(kept_BT, kept_V.repeat(3, 2), **TIGHT)
    assert 0 < kept_V.round().sum() < V and torch.equal(kept_V.round(), kept_V.abs().gt(0.5).double())
    student(ids_BT)
    assert not torch.equal(seen[0], seen[1])
    student.eval()(ids_BT)
    assert torch.equal(seen[2], rows_BTd)


# ---------------------------------------------------------------- files and configuration


def test_fresh_weights():
    torch.manual_seed(0)
    fields = {"vocab_size": 30, "embedding_size": 12, "hidden_size": 32, "attention_window": 4, "feed_forward_size": 48}
    gru, ln_lstm = (LSTMForCausalLM(LSTMConfig(cell=cell, **fields)) for cell in ("gru", "ln_lstm"))
    for block in gru.model.layers:
        r, z, n = block.gru.bias_ih_l0.chunk(3)
        assert (z == 1).all() and not torch.cat([r, n, block.gru.bias_hh_l0]).any()
        assert all(0.05 < weight.std() < 0.2 for weight in (block.gru.weight_ih_l0, block.gru.weight_hh_l0))
    for block in ln_lstm.model.layers:
        i, f, o, g = block.ln_lstm.bias.chunk(4)
        assert (f == 1).all() and not torch.cat([i, o, g, block.ln_lstm.cell_norm.bias]).any()
        assert all(0.05 < weight.std() < 0.2 for weight in (block.ln_lstm.weight_ih, block.ln_lstm.weight_hh))
        assert (block.ln_lstm.recurrent_norm.weight == 1).all() and (block.ln_lstm.input_norm.weight == 1).all()
        assert 0.015 < block.feed_forward.down.weight.std() < 0.025
    assert not gru.model.attention.value_gate.any() and (gru.model.attention.query_norm.weight == 1).all()


@every_variant
def test_saving_and_loading_keeps_every_bit(tmp_path, fields):
    student = make_student(dtype=torch.float32, **fields)
    student.save_pretrained(tmp_path)
    loaded = LSTMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == student.config.to_diff_dict()
    assert loaded.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_folder_from_before_these_fields_is_a_plain_lstm(tmp_path):
    student = make_student(dtype=torch.float32)
    student.save_pretrained(tmp_path)
    file = Path(tmp_path / "config.json")
    config = json.loads(file.read_text())
    for name in ("cell", "attention_window", "feed_forward_size", "embedding_dropout", "variational_dropout"):
        del config[name]
    file.write_text(json.dumps(config))
    names = {
        f"model.layers.{n}.lstm.{part}_l0"
        for n in range(L)
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    names |= {
        f"model.{part}.{kind}" for part in ("layers.0.norm", "layers.1.norm", "norm") for kind in ("weight", "bias")
    }
    names |= {f"model.{part}_projection.{kind}" for part in ("input", "output") for kind in ("weight", "bias")}
    assert names | {"model.embed_tokens.weight", "lm_head.weight"} == student.state_dict().keys()
    assert torch.equal(
        LSTMForCausalLM.from_pretrained(tmp_path)(random_ids(1, 4)).logits, student(random_ids(1, 4)).logits
    )


def test_the_configuration_refuses():
    wrong = {"cell": "rnn", "attention_window": 1, "feed_forward_size": 0, "embedding_dropout": 1.0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"LSTMConfig: {name} must be .*, found {value!r}$"):
            LSTMConfig(**{name: value})


def test_a_snapshot_of_the_cache_is_left_alone():
    student = make_student(attention_window=3)
    cache = student(random_ids(2, 4)).past_key_values
    snapshot, before = copy.copy(cache), [part.clone() for part in cache.state]
    student(random_ids(2, 3), past_key_values=cache)
    assert all(torch.equal(part, kept) for part, kept in zip(snapshot.state, before, strict=True))
    assert snapshot.get_seq_length() == 4 and cache.get_seq_length() == 7
