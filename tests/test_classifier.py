"""Classifiers, student and teacher: logits against plain loops over unpadded texts, losses against their formulas.

python -m pytest tests/test_classifier.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_student import TIGHT, H, L, V, make_student, oracle_student, random_ids
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from benchmarks.tiny import WORDS, World, save_tokenizer
from distill.accuracy import Verdicts, gain, majority_accuracy, wilson_interval
from distill.classifier import Classifier, Recall, load_classifier, logits_of, train_upper
from distill.classify import ClassifierTraining, objective_sums
from distill.config import (
    ClassificationConfig,
    CorpusConfig,
    FineTuningConfig,
    Length,
    StudentConfig,
    TeacherConfig,
    UserError,
)  # fmt: skip
from distill.corpus import side_of
from distill.labelled import NO_LABEL, Tokens, epoch_batches, load_labelled
from distill.objective import Objective
from distill.student import LSTMConfig, LSTMForSequenceClassification
from distill.transplant import build_classifier

C = 3
LENGTHS = [5, 1, 9, 4]
POOLINGS = ("last", "mean", "max")


def make_classifier(pooling: str = "last", **fields: Any) -> LSTMForSequenceClassification:
    """The tiny student's body with a random classifier on it, in fp64."""
    body = make_student()
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = LSTMConfig(**{**body.config.to_dict(), **labels, "pooling": pooling, **fields})
    classifier = LSTMForSequenceClassification(config).double().eval()
    classifier.model.load_state_dict(body.model.state_dict())
    generator = torch.Generator().manual_seed(5)
    for parameter in classifier.score.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return classifier


def texts() -> list[Tensor]:
    return [random_ids(length, seed=length) for length in LENGTHS]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    T = max(map(len, rows))
    ids_BT, mask_BT = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    for b, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(len(row))
        ids_BT[b, place], mask_BT[b, place] = row, 1
    return ids_BT, mask_BT


# ---------------------------------------------------------------- the student


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_follow_the_equations(pooling: str) -> None:
    """z from the language model's equations with an identity for its head, then pooling in plain words."""
    classifier, body = make_classifier(pooling), make_student()
    body.lm_head = torch.nn.Linear(body.config.embedding_size, body.config.embedding_size, bias=False).double()
    body.lm_head.weight.data = torch.eye(body.config.embedding_size, dtype=torch.float64)
    for row_T in texts():
        z_Td = oracle_student(body, row_T.tolist(), set(), torch.float64)
        pooled_d = {"last": z_Td[-1], "mean": sum(z_Td) / len(z_Td), "max": torch.stack(list(z_Td)).max(0).values}
        expected_C = classifier.score.weight @ pooled_d[pooling] + classifier.score.bias
        torch.testing.assert_close(classifier(row_T[None]).logits[0], expected_C, **TIGHT)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_neither_logits_nor_gradients(pooling: str, side: str) -> None:
    classifier, rows, labels_B = make_classifier(pooling), texts(), torch.tensor([0, 2, 1, 1])
    expected_BC = torch.cat([classifier(row[None]).logits for row in rows])
    torch.nn.functional.cross_entropy(expected_BC, labels_B).backward()
    expected = {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}
    classifier.zero_grad()
    ids_BT, mask_BT = padded(rows, side)
    output = classifier(ids_BT, attention_mask=mask_BT, labels=labels_B)
    torch.testing.assert_close(output.logits, expected_BC, **TIGHT)
    output.loss.backward()
    found = dict(classifier.named_parameters())
    assert len(expected) == len(found), "everything learns"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].grad, gradient, msg=name, **TIGHT)


def test_labels_follow_the_problem_type() -> None:
    classifier, ids_BT = make_classifier(), random_ids(2, 4)
    logits_BC = classifier(ids_BT).logits
    log_p_BC = logits_BC.log_softmax(-1)
    torch.testing.assert_close(classifier(ids_BT, labels=torch.tensor([2, -100])).loss, -log_p_BC[0, 2])
    classifier = make_classifier(problem_type="multi_label_classification")
    wanted_BC = torch.tensor([[0.0, 1, 1], [1, 0, 0]], dtype=torch.float64)
    p_BC = torch.sigmoid(logits_BC)
    expected = -(wanted_BC * p_BC.log() + (1 - wanted_BC) * (1 - p_BC).log()).mean()
    torch.testing.assert_close(classifier(ids_BT, labels=wanted_BC).loss, expected)
    classifier = make_classifier(problem_type="regression")
    expected = (logits_BC - wanted_BC).square().mean()
    torch.testing.assert_close(classifier(ids_BT, labels=wanted_BC).loss, expected)


def test_it_starts_from_a_language_model_and_loads_as_itself(tmp_path: Path) -> None:
    body = make_student(dtype=torch.float32)
    body.save_pretrained(tmp_path / "lm")
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=C)
    assert isinstance(classifier, LSTMForSequenceClassification)
    for name, weight in body.model.state_dict().items():
        assert torch.equal(classifier.model.state_dict()[name], weight), name
    classifier.save_pretrained(tmp_path / "classifier")
    again: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again(random_ids(2, 5)).logits, classifier(random_ids(2, 5)).logits)
    config = json.loads((tmp_path / "classifier" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForSequenceClassification"] == "student.LSTMForSequenceClassification"
    with pytest.raises(ValueError, match="pooling must be last, mean or max, found 'first'"):
        LSTMConfig(pooling="first")


def test_a_built_student_has_the_teachers_embedding(world: World, tmp_path: Path) -> None:
    teacher = load_classifier(
        TeacherConfig(model=str(world.teacher), dtype="fp32"), list("abc"), FineTuningConfig(length=Length(steps=1)),
        torch.device("cpu"), seed=0,
    )  # fmt: skip
    sizes = {"hidden_size": 8, "num_layers": 1}

    def build(transplant: bool = True, start_from: str | None = None, **fields: Any) -> LSTMForSequenceClassification:
        return build_classifier(
            StudentConfig(**{**sizes, **fields}), teacher.network, teacher.tokenizer, list("abc"),
            pooling="mean", seed=3, transplant=transplant, start_from=start_from,
        )  # fmt: skip

    embedding_Vd = teacher.network.get_input_embeddings().weight[:40]
    student = build()
    assert torch.equal(student.model.embed_tokens.weight, embedding_Vd)
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"} and student.config.pooling == "mean"
    assert torch.equal(build().score.weight, student.score.weight), "the seed decides"
    assert not torch.equal(build(transplant=False).model.embed_tokens.weight, embedding_Vd)
    narrow_Vr = build(embedding_size=6).model.embed_tokens.weight
    singular_r = torch.linalg.svdvals(embedding_Vd)[:6]
    torch.testing.assert_close(torch.linalg.svdvals(narrow_Vr), singular_r), "the principal axes keep most"

    lm = make_student(dtype=torch.float32)
    lm.save_pretrained(tmp_path)
    started = build(start_from=str(tmp_path), hidden_size=H, num_layers=L)
    assert torch.equal(started.model.output_projection.weight, lm.model.output_projection.weight)
    with pytest.raises(UserError, match=f"start_from: .*hidden_size is {H}, but student.hidden_size 8"):
        build(start_from=str(tmp_path))
    with pytest.raises(UserError, match="start_from: .*its cell is lstm, but student.cell gru"):
        build(start_from=str(tmp_path), hidden_size=H, num_layers=L, cell="gru")
    other = build(cell="gru", attention_window=3, feed_forward_size=5)
    assert other.model.layers[0].gru.hidden_size == 8 and other.model.attention and other.model.layers[0].feed_forward
    with pytest.raises(UserError, match="start_from: .*is a llama, expected an LSTM"):
        build(start_from=str(world.teacher))


# ---------------------------------------------------------------- losses and figures


def test_terms_against_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    student_BC, teacher_BC = (2 * torch.randn(4, C, generator=generator, dtype=torch.float64) for _ in range(2))
    labels_B = torch.tensor([1, NO_LABEL, 0, 2])
    T = 2.0
    terms = {"logit_mse": 1.0, "cross_entropy": 0.5, "forward_kl": 0.3, "skewed_reverse_kl": 0.2}
    sums = objective_sums(Objective(terms, T, skew=0.3), student_BC, labels_B, teacher_BC)
    mse = ce = kl = skewed = 0.0
    for z, t, label in zip(student_BC.tolist(), teacher_BC.tolist(), labels_B.tolist(), strict=True):
        mse += sum((a - b) ** 2 for a, b in zip(z, t, strict=True)) / C
        ce -= z[label] - math.log(sum(map(math.exp, z))) if label != NO_LABEL else 0.0
        q, p = ([math.exp(a / T) / sum(math.exp(b / T) for b in logits) for a in logits] for logits in (z, t))
        kl += T**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        skewed += T**2 * sum(a * math.log(a / (0.7 * b + 0.3 * a)) for a, b in zip(q, p, strict=True))
    found = {term: value.item() for term, value in sums.items()}
    expected = {"logit_mse": mse, "cross_entropy": ce, "forward_kl": kl, "skewed_reverse_kl": skewed}
    assert found == pytest.approx(expected, rel=1e-5)


def test_sums_are_divided_by_texts_and_cross_entropy_by_those_with_a_label() -> None:
    labels_N = np.array([0, NO_LABEL, 2, NO_LABEL, NO_LABEL])
    step: Any = SimpleNamespace(labels_N=labels_N, _rows=lambda step: np.array([[0, 1, 3, 2], [1, 3, 4, 1]][step]))
    assert [ClassifierTraining.divisor(step, n, "logit_mse") for n in (0, 1)] == [4, 4]
    assert [ClassifierTraining.divisor(step, n, "cross_entropy") for n in (0, 1)] == [2, 1], "never by nothing"


def test_figures_of_verdicts() -> None:
    logits_NC = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 0, 0]])
    teacher_NC = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]])
    verdicts = Verdicts(logits_NC, torch.tensor([0, 1, 2, 1]), teacher_NC)
    assert (verdicts.accuracy, verdicts.top1_agreement) == (0.75, 0.75)
    expected = -sum(logits_NC.log_softmax(-1)[row, label].item() for row, label in enumerate([0, 1, 2, 1])) / 4
    assert verdicts.nll_nats == pytest.approx(expected)
    p_NC, q_NC = teacher_NC.softmax(-1), logits_NC.softmax(-1)
    assert verdicts.kl_to_teacher_nats == pytest.approx((p_NC * (p_NC / q_NC).log()).sum().item() / 4)
    assert verdicts.as_dict()["accuracy_interval"] == wilson_interval(0.75, 4)
    other = Verdicts(logits_NC.flip(-1), verdicts.labels_N)
    found = gain(verdicts, other)
    assert found["accuracy_gain"] == 0.75 - other.accuracy
    low, high = found["accuracy_gain_interval"]
    assert low <= found["accuracy_gain"] <= high
    assert majority_accuracy(np.array([0, 1, 1, 2]), np.array([1, 1, 0, NO_LABEL, NO_LABEL, NO_LABEL])) == 0.5


def test_the_interval_solves_wilsons_equation() -> None:
    """Its ends are the shares p from which the observed one lies 1.96 standard errors of p away."""
    for share, count in ((0.75, 4), (0.9, 872), (0.5, 10)):
        for end in wilson_interval(share, count):
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count))
    assert wilson_interval(1.0, 20)[1] == pytest.approx(1) and wilson_interval(0.0, 20)[0] == pytest.approx(0)


# ---------------------------------------------------------------- the teacher


def llama(**fields: Any) -> PreTrainedModel:
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    config = LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, num_labels=C, initializer_range=0.3, **fields)
    return LlamaForSequenceClassification(config)


def bert() -> PreTrainedModel:
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=C, initializer_range=0.3, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    return BertForSequenceClassification(config)


def as_classifier(network: PreTrainedModel) -> Classifier:
    unused: Any = None
    return Classifier(network.double().eval(), unused, "tiny", torch.arange(C))  # type: ignore[operator]


TOKENS = Tokens([random_ids(n, seed=n).numpy() for n in (5, 1, 7, 3, 6)], padding=0)


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_recalled_layers_give_the_whole_networks_logits_and_gradients(make: Any, layers: int) -> None:
    torch.manual_seed(0)
    teacher = as_classifier(make())
    lower = train_upper(teacher.network, layers)
    assert lower is not None and len(lower) == 4 - layers
    trained = {name for name, p in teacher.network.named_parameters() if p.requires_grad}
    assert not any("embed" in name for name in trained)
    recall = Recall(teacher, lower, TOKENS)
    recall.ask(Accelerator(cpu=True), batch_tokens=10)
    rows_B, labels_B = np.array([3, 0, 2]), torch.tensor([1, 0, 2])

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        logits_BC = teacher.logits(*TOKENS.batch(rows_B))
        teacher.network.zero_grad()
        torch.nn.functional.cross_entropy(logits_BC, labels_B).backward()
        return logits_BC, {n: p.grad.clone() for n, p in teacher.network.named_parameters() if p.grad is not None}

    expected_BC, expected = gradients()
    counted: list[int] = []
    hook = lower[0].register_forward_hook(lambda *_: counted.append(1))
    lower[0].mlp.register_forward_hook(lambda *_: counted.append(100)) if make is llama else None
    with recall.spoken(recall.batch(rows_B)):
        found_BC, found = gradients()
    hook.remove()
    assert counted == [1], "the lower layers' own work is not done"
    torch.testing.assert_close(found_BC, expected_BC)
    assert expected.keys() == found.keys() == trained, "all that is to be trained is"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name, atol=1e-6, rtol=1e-5)
    again_BC, _ = gradients()
    assert torch.equal(again_BC, expected_BC), "the network is whole again"


def test_how_many_layers_can_be_trained() -> None:
    network = llama()
    assert train_upper(network, None) is None and all(p.requires_grad for p in network.parameters())
    assert train_upper(network, 4) is None
    assert not network.get_input_embeddings().weight.requires_grad
    with pytest.raises(UserError, match=r"fine_tuning.layers: expected at most the teacher's layers \(4\), found 5"):
        train_upper(network, 5)


def test_all_texts_are_asked_about_in_batches_of_few_tokens() -> None:
    teacher, asked = as_classifier(llama()), []

    def ask(rows_B: np.ndarray) -> Tensor:
        asked.append(rows_B)
        return teacher.logits(*TOKENS.batch(rows_B))

    said_NC = logits_of(ask, TOKENS, C, Accelerator(cpu=True), batch_tokens=14)
    assert [rows.tolist() for rows in asked] == [[2, 4], [0, 3], [1]]
    for row, ids in enumerate(TOKENS.ids):
        expected_C = teacher.logits(torch.from_numpy(ids)[None], torch.ones(1, len(ids), dtype=torch.int64))[0]
        torch.testing.assert_close(said_NC[row], expected_C.detach())


def saved(folder: Path, network: PreTrainedModel, **labels: Any) -> TeacherConfig:
    for name, value in labels.items():
        setattr(network.config, name, value)
    network.save_pretrained(folder)
    save_tokenizer(folder, WORDS[: V - 2])
    return TeacherConfig(model=str(folder), dtype="fp32")


def test_how_long_a_text_a_teacher_can_read() -> None:
    """What is longer fails inside the network, or is read at places that it has not learned."""
    assert as_classifier(llama(max_position_embeddings=77)).longest_text == 77
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_labels": C,
    }
    shape = RobertaConfig(vocab_size=40, max_position_embeddings=14, pad_token_id=1, **sizes)
    roberta = as_classifier(RobertaForSequenceClassification(shape).eval())
    assert roberta.longest_text == 12
    ids_BT = torch.full((1, 13), 5)
    roberta.logits(ids_BT[:, 1:], torch.ones(1, 12, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        roberta.logits(ids_BT, torch.ones(1, 13, dtype=torch.int64))
    lstm = LSTMForSequenceClassification(LSTMConfig(vocab_size=9, embedding_size=4, hidden_size=4, num_layers=1))
    assert as_classifier(lstm).longest_text == float("inf")


def test_a_teachers_labels_are_brought_into_order(tmp_path: Path) -> None:
    def load(folder: str, classes: list[str]) -> Classifier:
        return load_classifier(configs[folder], classes, None, torch.device("cpu"), 0)

    network = llama()
    configs = {
        "numbered": saved(tmp_path / "numbered", network),
        "named": saved(tmp_path / "named", network, id2label={0: "POSITIVE", 1: "neutral", 2: "Negative"}),
        "body": saved(tmp_path / "body", LlamaForCausalLM(network.config)),
    }
    assert load("numbered", ["x", "y", "z"]).order_C.tolist() == [0, 1, 2]
    ordered = load("named", ["negative", "neutral", "positive"])
    assert ordered.order_C.tolist() == [2, 1, 0]
    inputs = TOKENS.batch(np.array([0, 2]))
    plain_BC = network(*inputs).logits
    torch.testing.assert_close(ordered.logits(*inputs), plain_BC[:, [2, 1, 0]])
    for folder, classes, expected in (
        (
            "numbered",
            ["x", "y"],
            r"has 3 labels \(LABEL_0, LABEL_1, LABEL_2\), expected 2; classification.labels: x, y",
        ),
        ("named", ["good", "neutral", "bad"], "has the labels POSITIVE, neutral, Negative; expected those of .*good"),
        ("body", ["a", "b", "c"], "weights missing: score.weight; it is no classifier yet, .*fine_tuning"),
    ):
        with pytest.raises(UserError, match=expected):
            load(folder, classes)
    tuned = FineTuningConfig(length=Length(steps=1))
    one, same = (load_classifier(configs["body"], list("ab"), tuned, torch.device("cpu"), 1) for _ in range(2))
    assert torch.equal(one.network.score.weight, same.network.score.weight)


# ---------------------------------------------------------------- labelled text


def write(folder: Path, rows: list[dict[str, Any]]) -> CorpusConfig:
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return CorpusConfig(source=str(file), validation_fraction=0.2, test_fraction=0.2)


def test_texts_are_divided_by_content_and_unlabelled_ones_are_trained_on(tmp_path: Path) -> None:
    labels = ["b", "a", None, "other", 7]
    rows = [{"text": f"text {n}", "label": labels[n % 5]} for n in range(200)] + [{"text": " ", "label": "a"}]
    config = write(tmp_path, rows)
    text = load_labelled(config, ClassificationConfig(labels=("b", "a")))
    assert text.classes == ("b", "a")
    for side in ("train", "validation", "test"):
        part = getattr(text, side)
        known = [row for row in rows if row["label"] in ("a", "b") and row["text"].strip()]
        expected = [row for row in known if side_of(row["text"], config) == side]
        count = len(expected)
        assert part.texts[:count] == [row["text"] for row in expected]
        assert part.labels_N[:count].tolist() == [("b", "a").index(row["label"]) for row in expected]
        rest = [row["text"] for row in rows if row["label"] in (None, "other", 7)] if side == "train" else []
        assert part.texts[count:] == rest and set(part.labels_N[count:].tolist()) <= {NO_LABEL}
        assert text.all[text.places[side]] == part.texts
    assert load_labelled(config, ClassificationConfig()).classes == ("7", "a", "b", "other"), "whole numbers too"
    few = load_labelled(config, ClassificationConfig(labels=("b", "a"), max_texts=60))
    assert len(few.all) == 60 and few.fingerprint != text.fingerprint
    for side in ("train", "validation", "test"):
        kept = getattr(few, side).texts
        assert kept == [each for each in getattr(text, side).texts if each in kept], "on their side, in their order"
        assert 0 < len(kept) < len(getattr(text, side)), "from all sides"
    more = load_labelled(config, ClassificationConfig(labels=("b", "a"), max_texts=100))
    assert set(few.all) < set(more.all)
    turned = load_labelled(config, ClassificationConfig(labels=("a", "b")))
    assert turned.fingerprint != text.fingerprint


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": n % 12} for n in range(240)]
    assert load_labelled(write(tmp_path, rows), ClassificationConfig()).classes == tuple(map(str, range(12)))


def test_what_is_tested_on_is_not_trained_on_without_its_label(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(100)]
    text = load_labelled(write(tmp_path, [*rows, *({**row, "label": None} for row in rows)]), ClassificationConfig())
    held = {*text.validation.texts, *text.test.texts}
    assert len(held) > 20 and not held & set(text.train.texts)
    assert (text.train.labels_N == NO_LABEL).sum() == 100 - len(held), "the others are trained on a second time"


@pytest.mark.parametrize(
    ("rows", "fields", "expected"),
    [
        ([{"text": "x", "label": "a"}] * 3, {}, "label_field: label: expected two classes at least, found 'a' alone"),
        ([{"text": "x", "label": 0.5}], {}, "expected two classes at least, found no text or whole number in it"),
        ([{"text": "x", "kind": "a"}], {}, "classification.label_field: .*expected a field 'label', found text, kind"),
        ([{"body": "x", "label": "a"}], {}, "corpus.text_field: .*expected a field 'text', found body, label"),
        (
            [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(9)],
            {"labels": ("a", "c")},
            "no text .* 'c'; .*: a, b",
        ),
        ([{"text": f"{n}", "label": n} for n in range(2000)], {}, "expected at most 1000 classes, found 2,000"),
        ([{"text": "x", "label": "a"}, {"text": "x", "label": "b"}], {}, "no labelled text for"),
        ([{"text": "x", "label": "a"}], {"labels": ("a", "a")}, "names that differ"),
        ([{"text": f"{n}", "label": "ab"[n % 2]} for n in range(9)], {"test_split": "test"}, "test_split: .* is files"),
    ],
)
def test_labels_that_cannot_be_learned(tmp_path: Path, rows: list[Any], fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_labelled(write(tmp_path, rows), ClassificationConfig(**fields))


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    with pytest.raises(UserError, match="x.txt: expected records with text and label, found plain text"):
        load_labelled(CorpusConfig(source=str(tmp_path / "x.txt")), ClassificationConfig())


def test_a_hub_data_set_brings_its_classes_and_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    splits = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} {n}" for n in range(40)], "label": [n % 3 - 1 for n in range(40)]}, features=features
        )
        for name in ("train", "validation")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: splits[split])
    config = ClassificationConfig(test_split="validation")
    text = load_labelled(CorpusConfig(source="me/texts", validation_fraction=0.2, test_fraction=0.0), config)
    assert text.classes == ("neg", "pos")
    assert text.test.texts == [f"validation {n}" for n in range(40) if n % 3] and set(text.test.labels_N) == {0, 1}
    assert sum(text.train.labels_N == NO_LABEL) == 14 and all(t.startswith("train") for t in text.train.texts)


def test_epochs_are_shuffled_and_batches_alike_in_length() -> None:
    lengths_N = np.random.default_rng(0).integers(1, 50, 103)
    first, again, second = (epoch_batches(lengths_N, 4, epoch, seed=1) for epoch in (0, 0, 1))
    assert first.shape == (25, 4) and np.array_equal(first, again) and not np.array_equal(first, second)
    assert len(set(first.flatten().tolist())) == 100, "each text once at most"
    spread = np.ptp(lengths_N[first], axis=1).mean()
    assert spread < 10 < np.ptp(lengths_N[:100].reshape(25, 4), axis=1).mean()
