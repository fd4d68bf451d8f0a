"""Layer by layer: the teacher's inner states, and the term by its definition."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from conftest import World, run_command

from distill.config import TeacherConfig
from distill.corpus import Blocks, Split
from distill.fused import StudentWithLoss
from distill.objective import Objective
from distill.signals import Encoding, HiddenSignal
from distill.student import LSTMConfig, LSTMForCausalLM
from distill.teacher import load_teacher

LAYERS = ("student.num_layers=2", "stages.0.objective={hidden_mse: 1.0, layer_mse: 0.5}")


def test_layers_are_the_teachers_inner_states(world: World) -> None:
    teacher = load_teacher(TeacherConfig(model=str(world.teacher), dtype="fp32"), torch.device("cpu"))
    tokens = np.arange(60) % teacher.vocab_size
    split = Split(tokens, np.array([0, 60]), np.array([60]), np.array([10]))
    batch = Blocks(split, 8, 4, reset_at_documents=False).batch(np.array([1, 3]))
    signal = teacher.signal(batch, Encoding("hidden", layers=(1, 2)))
    assert isinstance(signal, HiddenSignal)
    expected = teacher.model(
        batch.window_BW, position_ids=batch.positions_BW, use_cache=False, output_hidden_states=True
    ).hidden_states
    for depth, layer_Nd in zip((1, 2), signal.layers, strict=True):
        torch.testing.assert_close(layer_Nd, expected[depth][:, -8:].flatten(0, 1))
    torch.testing.assert_close(signal.layers[-1], signal.hidden_Nd)  # the deepest is the final one


def test_the_term_by_its_definition(world: World) -> None:
    """Mean over blocks of the squared distance of projected block outputs to normalised states; every part trains."""
    torch.manual_seed(0)
    student = LSTMForCausalLM(LSTMConfig(vocab_size=11, embedding_size=6, hidden_size=8, num_layers=2)).train()
    model = StudentWithLoss(student, layer_width=6)
    inputs_BT = torch.randint(11, (2, 5))
    layers = (torch.randn(10, 6) * 30, torch.randn(10, 6) + 4)
    signal = HiddenSignal(torch.randn(10, 6), None, layers)  # type: ignore[arg-type]
    loss, parts, _ = model(inputs_BT, inputs_BT, None, None, signal, Objective({"layer_mse": 2.0}))
    loss.backward()

    x_BTH = student.model.input_projection(student.model.embed_tokens(inputs_BT))
    expected = torch.zeros(())
    for block, project, layer_Nd in zip(student.model.layers, model.layer_projections, layers, strict=True):
        x_BTH = x_BTH + block.lstm(block.norm(x_BTH))[0]
        target_Nd = (layer_Nd - layer_Nd.mean(-1, keepdim=True)) / layer_Nd.std(-1, unbiased=False, keepdim=True)
        expected = expected + F.mse_loss(project(x_BTH).flatten(0, 1), target_Nd, reduction="sum") / 6 / 2
    torch.testing.assert_close(parts["layer_mse"], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.detach(), 2 * expected.detach(), rtol=1e-4, atol=1e-5)
    assert all(project.weight.grad is not None for project in model.layer_projections)
    assert student.model.layers[0].lstm.weight_hh_l0.grad is not None


def test_layers_need_the_live_teacher(world: World) -> None:
    done = run_command(str(world.recipe), *LAYERS, "targets.cache=true", "run.name=cached")
    assert done.returncode == 2 and "layer_mse needs the live teacher; set targets.cache=false" in done.stderr
