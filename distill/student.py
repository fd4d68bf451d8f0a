"""The student: a residual recurrent language model that the Hugging Face library treats as its own.

    token ids ─> embedding (V x d) ─> projection d->H ─> L x [x + cell(LayerNorm(x))]
              ─> LayerNorm ─> projection H->d ─> z (the teacher's width) ─> head (d x V) ─> logits

Embedding and head have the teacher's width d, so that the teacher's own matrices fit in unchanged; everything a token
leaves behind is the state of each layer. The cell is an LSTM with the state (h, c) (Hochreiter and Schmidhuber 1997,
Neural Computation 9(8); forget gate: Gers, Schmidhuber and Cummins 2000, Neural Computation 12(10)):

    f = sigmoid(W_f [x, h'] + b_f)    i = sigmoid(W_i [x, h'] + b_i)    o = sigmoid(W_o [x, h'] + b_o)
    g = tanh(W_g [x, h'] + b_g)       c = f * c' + i * g                h = o * tanh(c)

so a context of any length costs L * 2 * H numbers per sequence. Two others can be chosen by `cell`: a GRU, and an LSTM
with layer normalisation. Options add a feed-forward block after each cell and attention to the last W states.

In this order: configuration, cache, cells, blocks, models. The file imports torch and transformers only: it is what
`save_pretrained` copies beside the weights, and anybody loads it with

    AutoModelForCausalLM.from_pretrained("OWNER/STUDENT", trust_remote_code=True)

Shapes in names: B sequences, T positions, V vocabulary, d teacher's width (`embedding_size`), H width of the cells
(`hidden_size`), G gates of all units, L layers, W window of the attention, M = W - 1 positions before one's own, 1 a
dimension of size one. `reset_BT[b, t]` is True where the state of sequence b is zero *before* position t is read: the
first token of a document in a packed block, or the first real token after padding.
"""

import copy
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils import can_return_tuple

State = tuple[Tensor, ...]  # the sequences are axis 1 of each part
STATE_NAMES = {"lstm": ("h_LBH", "c_LBH"), "gru": ("h_LBH",), "ln_lstm": ("h_LBH", "c_LBH")}  # by cell
MEMORY_NAMES = ("memory_MBH", "valid_MB")  # of the attention, after those of the cells
SIGNALS = 16  # inputs beside x that tell the gates what to do; three are used, and see `misread`
STRETCH = 256  # positions that attend at one time: scores of a long text do not fill the memory
SHUT = 1e4  # a gate's sigmoid is 0 at -SHUT and 1 at SHUT, exactly and in any type
Read = Callable[[int], tuple[Tensor, State]]  # see LSTMModel.forward


class LSTMConfig(PreTrainedConfig):
    """Shape and regularisation of a student.

    Args:
        vocab_size: V, tokens; the teacher's.
        embedding_size: d, the teacher's hidden width: rows of the embedding and of the head, and the
            width of the output `z` that hidden regression compares with the teacher's.
        hidden_size: H, units per layer (the teacher's `hidden_size` is our `embedding_size`).
        num_layers: L, layers.
        cell: "lstm", "gru" or "ln_lstm" (LayerNormLSTM).
        attention_window: W, positions that the attention reads, its own among them; None for no attention.
        feed_forward_size: units of the feed-forward block after each cell; None for no such blocks.
        embedding_dropout: probability, on the rows of the embedding (AWD-LSTM): a word is dropped wherever it stands.
        input_dropout: probability, on the projected embedding.
        output_dropout: probability, on what cells, attention and feed-forward blocks add to the residual stream.
        variational_dropout: input and output dropout have one mask for all positions (arXiv 1512.05287).
        recurrent_dropout: probability, on the entries of each recurrent matrix `weight_hh` (DropConnect,
            AWD-LSTM, arXiv 1708.02182); one mask per forward call, the same at all its positions.
        layer_norm_eps: added to the variance in LayerNorm.
        initializer_range: standard deviation of fresh embeddings and linear layers.
        head_bias: whether the head has a bias of V numbers.
        tie_word_embeddings: head and embedding are one matrix.
        use_cache: return the state by default outside training.
        pooling: what a classifier reads of a sequence: `last`, z after its last token; `mean` or `max` over tokens.
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's, read by `generate`.

    Raises:
        ValueError: listing every field whose value cannot be used.
    """

    model_type = "potstill_lstm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers"}

    vocab_size: int = 49152
    embedding_size: int = 576
    hidden_size: int = 512
    num_layers: int = 2
    cell: str = "lstm"
    attention_window: int | None = None
    feed_forward_size: int | None = None
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    variational_dropout: bool = False
    recurrent_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    head_bias: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pooling: str = "last"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        problems = []
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers"):
            if type(value := getattr(self, name)) is not int or value < 1:
                problems.append(f"{name} must be a whole number of at least 1, found {value!r}")
        for name, least in (("attention_window", 2), ("feed_forward_size", 1)):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < least):
                problems.append(f"{name} must be a whole number of at least {least} or None, found {value!r}")
        if self.cell not in STATE_NAMES:
            problems.append(f"cell must be one of {', '.join(STATE_NAMES)}, found {self.cell!r}")
        for name in ("embedding_dropout", "input_dropout", "output_dropout", "recurrent_dropout"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < 1:
                problems.append(f"{name} must be a probability in [0, 1), found {value!r}")
        for name in ("layer_norm_eps", "initializer_range"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 < value < float("inf"):
                problems.append(f"{name} must be a positive number, found {value!r}")
        if self.pooling not in ("last", "mean", "max"):
            problems.append(f"pooling must be last, mean or max, found {self.pooling!r}")
        if problems:
            raise ValueError("LSTMConfig: " + "; ".join(problems))


class Call(NamedTuple):
    """One forward call that may be taken back: the state before it, and how to read its first n positions again."""

    begin: int
    state: State
    read: Read


class LSTMCache:
    """The state after the tokens read so far; what `past_key_values` is for this model, whatever its cell.

    `state` has the parts that `LSTMModel.state_names` names, and none before the first token. The model replaces the
    tensors and never writes into them, so `copy.copy(cache)` is a free snapshot, and outside training the cache
    remembers the state before each of its recent calls: `crop` goes back to one of these and reads on from there. That
    covers at least the last `REWINDABLE` positions, at one state a call. Not a `transformers.Cache`: that is a list of
    layers of keys and values which grow; `generate` needs only the methods below.
    """

    REWINDABLE = 64
    is_compileable = False
    is_croppable = True

    def __init__(self, *state: Tensor, seen_tokens: int = 0):
        self.state: State = state
        self.seen_tokens = seen_tokens
        self.calls: deque[Call] = deque()

    def __copy__(self) -> "LSTMCache":
        copied = LSTMCache(*self.state, seen_tokens=self.seen_tokens)
        copied.calls.extend(self.calls)
        return copied

    @property
    def h_LBH(self) -> Tensor | None:
        """Outputs of the cells at the last position; None if nothing was read yet."""
        return self.state[0] if self.state else None

    @property
    def c_LBH(self) -> Tensor | None:
        """Contents of the cells of an LSTM; a GRU has none."""
        return self.state[1] if self.state and len(self.state) % 2 == 0 else None  # the memory has two parts

    @property
    def state_bytes(self) -> int:
        """What the state takes, snapshots not counted. Does not depend on the positions read."""
        return sum(part.numel() * part.element_size() for part in self.state)

    def update(self, state: State, new_tokens: int, read: Read | None = None) -> None:
        """Take the state after `new_tokens` further positions; without `read` there is no way back."""
        if read is None:
            self.calls.clear()
        else:
            self.calls.append(Call(self.seen_tokens, self.state, read))
        self.state = state
        self.seen_tokens += new_tokens
        while len(self.calls) > 1 and self.calls[1].begin <= self.seen_tokens - self.REWINDABLE:
            self.calls.popleft()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, padding included. Memory does not depend on it."""
        return self.seen_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n positions, or, as older callers have it, all but the first n. Keeps the rest exactly.

        Raises:
            ValueError: going back further than the cache remembers.
        """
        keep = self.seen_tokens + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if keep >= self.seen_tokens:
            return
        oldest = self.calls[0].begin if self.calls else self.seen_tokens
        if keep < oldest:
            raise ValueError(
                f"crop: {keep} of {self.seen_tokens} positions are to be kept, but this state can only go back to "
                f"{oldest}: it remembers {self.REWINDABLE} positions, none from training or before its rows were "
                "selected, reordered or repeated; keep copy.copy(cache) to come back to"
            )
        while (call := self.calls.pop()).begin > keep:
            pass
        self.state, self.seen_tokens = call.state, keep
        if keep > call.begin:
            self.state = call.read(keep - call.begin)[1]
            self.calls.append(call)

    def activate_past_recording(self) -> None:
        """What assisted generation asks for before it crops; recent calls are always remembered."""

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.calls.clear()  # they were read with other rows
        self.state = tuple(change(part) for part in self.state)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in this order."""
        self._change(lambda part: part.index_select(1, indices.to(part.device)))

    reorder_cache = batch_select_indices  # what beam search calls

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, copies side by side."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=1))

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen_tokens = (), 0
        self.calls.clear()

    def detach(self) -> "LSTMCache":
        """A copy cut off from the graph: carries the state, not the gradient (truncated BPTT)."""
        detached = copy.copy(self)
        detached._change(Tensor.detach)
        return detached


class Rows(torch.autograd.Function):
    """Rows picked by number, each once at most, where the number after the last stands for zeros.

    The gradient of a row is that of where it went, so it is picked as well; a gather's is added up, row by row.
    """

    @staticmethod
    def forward(ctx: Any, x_nH: Tensor, source_m: Tensor, place_n: Tensor) -> Tensor:
        """(n, H) -> (m, H); `place_n` says where each row goes, m for nowhere."""
        ctx.save_for_backward(source_m, place_n)
        return torch.cat([x_nH, x_nH.new_zeros(1, x_nH.shape[1])]).index_select(0, source_m)

    @staticmethod
    def backward(ctx: Any, grad_mH: Tensor) -> tuple[Tensor, None, None]:
        source_m, place_n = ctx.saved_tensors
        return Rows.apply(grad_mH, place_n, source_m), None, None


class Steps(NamedTuple):
    """How one run of nn.LSTM or nn.GRU forgets in the middle, in rows that do so at different positions.

    With at most R resets in a row it takes S = T + R steps. A row that resets at a position spends a step before it
    after which its state is 0 exactly, and through which no gradient comes back; rows with fewer resets end with steps
    that leave c as it is. Inputs beside x drive the gates to that:

    - LSTM: forgetting shuts i, f and o, so h = c = 0; holding shuts i and opens f, so c = c'.
    - GRU: forgetting shuts r and z, so h = n; and n = 0, as the bias of n that does not pass through r comes in with
      the third signal, at steps that read a position. There is nothing to hold: h is the last position's output.

    Cutting the run into pieces instead, with the state carried, is slower: the backward pass goes through all weights
    once a piece.
    """

    source_n: Tensor  # the position b * T + t that is read at step s of row b, where n = s * B + b; B * T for none
    place_N: Tensor  # the step s * B + b that reads a position, where N = b * T + t
    signals_SBI: Tensor  # I = SIGNALS: 1 in the first where a row forgets, the second where it holds, the third else

    @classmethod
    def of(cls, reset_BT: Tensor) -> "Steps | None":
        """None if no row resets after its first position. One list of steps serves all layers; costs a device sync."""
        later_BT = F.pad(reset_BT[:, 1:], (1, 0))
        resets_B1 = later_BT.sum(1, keepdim=True)
        R, (B, T) = int(resets_B1.max()), reset_BT.shape
        if R == 0:
            return None
        row_B, step_S = torch.arange(B, device=reset_BT.device), torch.arange(T + R, device=reset_BT.device)
        place_BT = step_S[:T] + later_BT.cumsum(1)
        position_BT = row_B[:, None] * T + step_S[:T]
        source_BS = place_BT.new_full((B, T + R), B * T).scatter_(1, place_BT, position_BT)
        read_BS, hold_BS = source_BS < B * T, step_S >= T + resets_B1
        signals_SBI = torch.stack([~read_BS & ~hold_BS, hold_BS, read_BS], -1).transpose(0, 1)
        place_N = (place_BT * B + row_B[:, None]).flatten()
        return cls(source_BS.t().flatten(), place_N, F.pad(signals_SBI, (0, SIGNALS - 3)))

    def inputs(self, x_BTH: Tensor) -> Tensor:
        """What the steps read: (S, B, H + SIGNALS)."""
        x_nH = Rows.apply(x_BTH.flatten(0, 1), self.source_n, self.place_N)
        return torch.cat([x_nH.view(*self.signals_SBI.shape[:2], -1), self.signals_SBI.to(x_nH.dtype)], -1)

    def weights_of_lstm(self, weights: list[Tensor]) -> list[Tensor]:
        """`weight_ih` with the columns of the signals; gates are stacked i, f, g, o."""
        weight_GH, *others = weights
        columns_4HI = weight_GH.new_zeros(4, len(weight_GH) // 4, SIGNALS)
        columns_4HI[:, :, 0] = weight_GH.new_tensor([-SHUT, -SHUT, 0.0, -SHUT])[:, None]
        columns_4HI[:, :, 1] = weight_GH.new_tensor([-SHUT, SHUT, 0.0, 0.0])[:, None]
        return [torch.cat([weight_GH, columns_4HI.flatten(0, 1)], 1), *others]

    def weights_of_gru(self, weights: list[Tensor]) -> list[Tensor]:
        """`weight_ih` with the columns of the signals, and `bias_ih` without that of n; gates are stacked r, z, n."""
        weight_GH, recurrent_GH, bias_G, recurrent_bias_G = weights
        r_H, z_H, n_H = bias_G.chunk(3)
        columns_3HI = weight_GH.new_zeros(3, len(n_H), SIGNALS)
        columns_3HI[:, :, 0] = weight_GH.new_tensor([-SHUT, -SHUT, 0.0])[:, None]
        columns_3HI[2, :, 2] = n_H
        weight_GK = torch.cat([weight_GH, columns_3HI.flatten(0, 1)], 1)
        return [weight_GK, recurrent_GH, torch.cat([r_H, z_H, torch.zeros_like(n_H)]), recurrent_bias_G]

    def at_positions(self, output_SBH: Tensor) -> Tensor:
        """The outputs of the T positions, (B, T, H)."""
        B, H = output_SBH.shape[1:]
        return Rows.apply(output_SBH.flatten(0, 1), self.place_N, self.source_n).view(B, -1, H)


def misread(cell: nn.LSTM | nn.GRU, x_BTH: Tensor) -> bool:
    """Whether oneDNN may give wrong gradients for these inputs, without a word.

    From 1,024 units on, its backward pass in bf16 on AMX (torch 2.13) is off by more than the gradient's own size, or
    NaN. It is right where inputs are 16 wider than the state, as they are with SIGNALS.
    """
    low = x_BTH.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return low and x_BTH.device.type == "cpu" and isinstance(cell, nn.LSTM) and cell.hidden_size >= 1024


def run_fused(
    cell: nn.LSTM | nn.GRU, x_BTH: Tensor, state: State, steps: Steps | None, dropout: float
) -> tuple[Tensor, State]:
    """One run of the library's own cell: (outputs, state after them). `dropout`: of the recurrent weights.

    Of the GRU this is the form that cuDNN has: r is applied after the recurrent product, and z says what is kept,

        r = sigmoid(W_r x + U_r h' + b_r)    n = tanh(W_n x + b_n + r * (U_n h' + e_n))
        z = sigmoid(W_z x + U_z h' + b_z)    h = (1 - z) * n + z * h'

    where Cho et al. (2014, arXiv 1406.1078) have n = tanh(W_n x + U_n (r * h') + b_n), a different function (but for a
    diagonal U_n and e_n = 0), whose recurrent product has to wait for r; and where others write
    h = (1 - z) * h' + z * n, their z is 1 - z of here.
    """
    gru = isinstance(cell, nn.GRU)
    widened = steps is None and torch.is_grad_enabled() and misread(cell, x_BTH)
    if steps is None and not dropout and not widened:
        output_BTH, last = cell(x_BTH, state[0] if gru else state)
        return output_BTH, (last,) if gru else last
    # The module reads a cached list of its weights, so others have to be handed to the function underneath.
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")  # the order of torch.lstm and torch.gru
    weights: list[Tensor] = [cell.get_parameter(name) for name in names]
    # One mask for all positions; F.dropout scales what it keeps by 1 / (1 - p).
    weights[1] = F.dropout(weights[1], dropout) if dropout else weights[1]
    input_BTI = x_BTH
    if steps is not None:
        input_BTI = steps.inputs(x_BTH)  # (S, B, I)
        weights = steps.weights_of_gru(weights) if gru else steps.weights_of_lstm(weights)
    elif widened:
        input_BTI, weights[0] = F.pad(x_BTH, (0, SIGNALS)), F.pad(weights[0], (0, SIGNALS))
    options = (True, 1, 0.0, cell.training, False, steps is None)  # biases, 1 layer, no dropout, ..., batch first
    if gru:
        output_BTH, *state_after = torch.gru(input_BTI, state[0], weights, *options)
    else:
        output_BTH, *state_after = torch.lstm(input_BTI, state, weights, *options)
    if steps is None:
        return output_BTH, tuple(state_after)
    output_BTH = steps.at_positions(output_BTH)
    return output_BTH, (output_BTH[:, -1][None], *state_after[1:])


class LayerNormLSTM(nn.Module):
    """The layer-normalised LSTM (Ba, Kiros and Hinton 2016, arXiv 1607.06450, equations 20 to 22):

        [i, f, o, g] = LN(W x) + LN(U h') + b    c = sigmoid(f) * c' + sigmoid(i) * tanh(g)
                                                 h = sigmoid(o) * tanh(LN(c))

    LN has a gain, and that of c a bias; others would add to b. No fast kernel has norms inside the recurrence.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        self.input_norm = nn.LayerNorm(4 * hidden_size, eps=eps, bias=False)
        self.recurrent_norm = nn.LayerNorm(4 * hidden_size, eps=eps, bias=False)
        self.cell_norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x_BTH: Tensor, state: State, reset_BT: Tensor | None, dropout: float) -> tuple[Tensor, State]:
        """As `run_fused`, with resets in place of steps."""
        device = x_BTH.device.type
        weight_GH: Tensor = F.dropout(self.weight_hh, dropout) if dropout else self.weight_hh
        if torch.is_autocast_enabled(device):
            weight_GH = weight_GH.to(torch.get_autocast_dtype(device))
        input_BTG = self.input_norm(F.linear(x_BTH, self.weight_ih)) + self.bias
        h_1BH, c_1BH = (part.to(input_BTG.dtype) for part in state)
        output_BTH, c_BH = LayerNormRecurrence.apply(
            input_BTG, h_1BH[0], c_1BH[0], weight_GH, self.recurrent_norm.weight, self.cell_norm.weight,
            self.cell_norm.bias, reset_BT, self.cell_norm.eps,
        )  # fmt: skip
        return output_BTH, (output_BTH[:, -1][None], c_BH[None])


class LayerNormRecurrence(torch.autograd.Function):
    """The loop of LayerNormLSTM over positions, with its gradient written out.

    Autograd's own would add to the recurrent matrix's gradient once a position; here each weight's gradient is one
    product over all positions at the end.
    """

    @staticmethod
    def forward(
        ctx: Any, input_BTG: Tensor, h_BH: Tensor, c_BH: Tensor, weight_GH: Tensor, gain_G: Tensor, cell_gain_H: Tensor,
        cell_bias_H: Tensor, reset_BT: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        H, G = len(cell_gain_H), len(gain_G)
        resets = [None] * input_BTG.shape[1] if reset_BT is None else reset_BT[..., None].unbind(1)
        steps, outputs = [], []
        with torch.autocast(input_BTG.device.type, enabled=False):
            for input_BG, reset_B1 in zip(input_BTG.unbind(1), resets, strict=True):
                if reset_B1 is not None:
                    h_BH, c_BH = h_BH.masked_fill(reset_B1, 0.0), c_BH.masked_fill(reset_B1, 0.0)
                product_BG = (h_BH.to(weight_GH.dtype) @ weight_GH.t()).to(input_BG.dtype)
                gates_BG, *moments = torch.native_layer_norm(product_BG, (G,), gain_G, None, eps)
                gates_BG += input_BG
                gates_BG[:, : 3 * H].sigmoid_()
                gates_BG[:, 3 * H :].tanh_()
                i_BH, f_BH, o_BH, g_BH = gates_BG.chunk(4, 1)
                before, c_BH = (h_BH, c_BH), f_BH * c_BH + i_BH * g_BH
                y_BH, *cell_moments = torch.native_layer_norm(c_BH, (H,), cell_gain_H, cell_bias_H, eps)
                y_BH.tanh_()
                h_BH = o_BH * y_BH
                outputs.append(h_BH)
                steps.append((*before, product_BG, *moments, gates_BG, c_BH, *cell_moments, y_BH))
        if any(ctx.needs_input_grad):
            ctx.steps, ctx.resets = steps, resets
            ctx.save_for_backward(weight_GH, gain_G, cell_gain_H, cell_bias_H)
        return torch.stack(outputs, 1), c_BH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output_BTH: Tensor, d_c_BH: Tensor) -> tuple[Tensor | None, ...]:
        weight_GH, gain_G, cell_gain_H, cell_bias_H = ctx.saved_tensors
        H, G = len(cell_gain_H), len(gain_G)
        d_norm = torch.ops.aten.native_layer_norm_backward
        d_h_BH, rows = torch.zeros_like(d_c_BH), []
        for step, reset_B1, d_output_BH in zip(
            reversed(ctx.steps), reversed(ctx.resets), reversed(d_output_BTH.unbind(1)), strict=True
        ):
            _, c_before_BH, product_BG, mean, scale, gates_BG, c_BH, cell_mean, cell_scale, y_BH = step
            i_BH, f_BH, o_BH, g_BH = gates_BG.chunk(4, 1)
            d_h_BH = d_h_BH + d_output_BH
            d_y_BH = d_h_BH * o_BH * (1 - y_BH * y_BH)  # of LN(c), before the tanh
            cell = (c_BH, (H,), cell_mean, cell_scale, cell_gain_H, cell_bias_H)
            d_c_BH = d_c_BH + d_norm(d_y_BH, *cell, [True, False, False])[0]
            slope_BG = gates_BG * (1 - gates_BG)
            slope_BG[:, 3 * H :] = 1 - g_BH * g_BH
            d_gates_BG = torch.cat([d_c_BH * g_BH, d_c_BH * c_before_BH, d_h_BH * y_BH, d_c_BH * i_BH], 1) * slope_BG
            recurrent = (product_BG, (G,), mean, scale, gain_G, None)
            d_product_BG = d_norm(d_gates_BG, *recurrent, [True, False, False])[0].to(weight_GH.dtype)
            d_h_BH, d_c_BH = (d_product_BG @ weight_GH).to(d_c_BH.dtype), d_c_BH * f_BH
            if reset_B1 is not None:
                d_h_BH, d_c_BH = d_h_BH.masked_fill(reset_B1, 0.0), d_c_BH.masked_fill(reset_B1, 0.0)
            rows.append((d_gates_BG, d_product_BG, d_y_BH))
        # N = T * B rows, the last position first, as they came
        h_NH, _, product_NG, mean_N1, scale_N1, _, c_NH, cell_mean_N1, cell_scale_N1, _ = (
            torch.cat(parts) for parts in zip(*reversed(ctx.steps), strict=True)
        )
        d_gates_NG, d_product_NG, d_y_NH = (torch.cat(parts) for parts in zip(*rows, strict=True))
        d_gain_G = d_norm(d_gates_NG, product_NG, (G,), mean_N1, scale_N1, gain_G, None, [False, True, False])[1]
        cell = (c_NH, (H,), cell_mean_N1, cell_scale_N1, cell_gain_H, cell_bias_H)
        _, d_cell_gain_H, d_cell_bias_H = d_norm(d_y_NH, *cell, [False, True, True])
        d_weight_GH = d_product_NG.t() @ h_NH.to(weight_GH.dtype)
        d_input_BTG = torch.stack([d_gates_BG for d_gates_BG, _, _ in reversed(rows)], 1)
        return d_input_BTG, d_h_BH, d_c_BH, d_weight_GH, d_gain_G, d_cell_gain_H, d_cell_bias_H, None, None


class Dropout(nn.Module):
    """Dropout of (B, T, H); if `locked` with one mask for all positions (Gal and Ghahramani 2015, arXiv 1512.05287)."""

    def __init__(self, probability: float, locked: bool) -> None:
        super().__init__()
        self.probability, self.locked = probability, locked

    def forward(self, x_BTH: Tensor) -> Tensor:
        """What is kept is scaled by 1 / (1 - probability)."""
        if self.locked and self.training and self.probability:
            return x_BTH * F.dropout(torch.ones_like(x_BTH[:, :1]), self.probability)
        return F.dropout(x_BTH, self.probability, self.training)


class FeedForward(nn.Module):
    """x + dropout(D (silu(G n) * U n)) with n = LayerNorm(x): SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        size = config.feed_forward_size or 0
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gate = nn.Linear(config.hidden_size, size, bias=False)
        self.up = nn.Linear(config.hidden_size, size, bias=False)
        self.down = nn.Linear(size, config.hidden_size, bias=False)
        self.dropout = Dropout(config.output_dropout, config.variational_dropout)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        normed_BTH = self.norm(x_BTH)
        return x_BTH + self.dropout(self.down(F.silu(self.gate(normed_BTH)) * self.up(normed_BTH)))


class WindowAttention(nn.Module):
    """x + dropout(attention): one head over the last W positions of the residual stream, a position's own among them.

    As in SHA-RNN (Merity 2019, arXiv 1911.11423) the query alone has a matrix. With m = LayerNorm(x), a position reads

        sum over s of softmax_s(LayerNorm(Q m) m_s / sqrt(H)) * sigmoid(v) * m_s

    There, keys and queries also have gains, which are one with that of the query's norm here. Places need no encoding:
    the cells before know the order. What is kept of the past is m at M = W - 1 positions.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.earlier = (config.attention_window or 1) - 1
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.value_gate = nn.Parameter(torch.zeros(config.hidden_size))
        self.dropout = Dropout(config.output_dropout, config.variational_dropout)

    def forward(self, x_BTH: Tensor, memory: State, reset_BT: Tensor | None) -> tuple[Tensor, State]:
        """`memory`: (memory_MBH, 1 where valid_MB), or nothing before the first token."""
        m_BTH, read = self.norm(x_BTH), []
        if not memory:
            memory = m_BTH.new_zeros(self.earlier, *m_BTH[:, 0].shape), m_BTH.new_zeros(self.earlier, len(m_BTH))
        if reset_BT is None:
            reset_BT = torch.zeros_like(m_BTH[..., 0], dtype=torch.bool)
        for m_BtH, reset_Bt in zip(m_BTH.split(STRETCH, 1), reset_BT.split(STRETCH, 1), strict=True):
            read_BtH, memory = self._read(m_BtH, memory, reset_Bt)
            read.append(read_BtH)
        return x_BTH + self.dropout(torch.cat(read, 1)), memory

    def _read(self, m_BTH: Tensor, memory: State, reset_BT: Tensor) -> tuple[Tensor, State]:
        """What T positions read, and the memory after them."""
        T, M, device = m_BTH.shape[1], self.earlier, m_BTH.device
        memory_BMH, valid_BM = memory[0].transpose(0, 1).to(m_BTH.dtype), memory[1].t().bool()
        # A position sees those of its own document: with as many resets before them. -1: of none.
        document_BT = reset_BT.long().cumsum(1)
        document_BS = torch.cat([valid_BM.long() - 1, document_BT], 1)
        age_TS = torch.arange(M, M + T, device=device)[:, None] - torch.arange(M + T, device=device)
        seen_BTS = (document_BT[..., None] == document_BS[:, None]) & (age_TS >= 0) & (age_TS <= M)
        keys_BSH = torch.cat([memory_BMH, m_BTH], 1)
        query_BTH, values_BSH = self.query_norm(self.query(m_BTH)), torch.sigmoid(self.value_gate) * keys_BSH
        query_BTH = query_BTH.to(keys_BSH.dtype)
        read_BTH = F.scaled_dot_product_attention(query_BTH, keys_BSH, values_BSH, attn_mask=seen_BTS)
        valid_MB = (document_BS[:, T:] == document_BT[:, -1:]).t()
        memory_MBH = keys_BSH[:, T:].transpose(0, 1).masked_fill(~valid_MB[..., None], 0.0)
        return read_BTH, (memory_MBH, valid_MB.to(memory_MBH.dtype))


class LSTMBlock(nn.Module):
    """x + dropout(cell(LayerNorm(x))), and the feed-forward block if there is one.

    The cell is the module `lstm`, `gru` or `ln_lstm`. Plain nn.LSTM: its `proj_size` would switch off oneDNN.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.layer_norm_eps
        self.norm = nn.LayerNorm(H, eps=eps)
        self.cell_name = config.cell
        if config.cell == "ln_lstm":
            self.ln_lstm = LayerNormLSTM(H, eps)
        else:
            kind = nn.GRU if config.cell == "gru" else nn.LSTM
            self.add_module(config.cell, kind(H, H, batch_first=True))
        self.dropout = Dropout(config.output_dropout, config.variational_dropout)
        self.recurrent_dropout = config.recurrent_dropout
        self.feed_forward = FeedForward(config) if config.feed_forward_size else None

    @property
    def cell(self) -> Any:
        """The recurrent module."""
        return self.get_submodule(self.cell_name)

    def forward(
        self, x_BTH: Tensor, state: State | None, reset_BT: Tensor | None, steps: Steps | None
    ) -> tuple[Tensor, State]:
        """`state`: (1, B, H) each, None before the first token. `steps`: of `reset_BT` after the first position."""
        normed_BTH = self.norm(x_BTH)
        # A state read under autocast is bf16, without it the weights' dtype; nn.LSTM wants that of its input.
        zero_1BH = normed_BTH.new_zeros(1, *normed_BTH[:, 0].shape)
        if state is None:
            state = (zero_1BH,) * len(STATE_NAMES[self.cell_name])
        state = tuple(part.to(zero_1BH.dtype) for part in state)
        if reset_BT is not None:
            # masked_fill, not a product: it also stops what is infinite (0 * inf is NaN), forward and back
            state = tuple(part.masked_fill(reset_BT[:, :1], 0.0) for part in state)
        dropout = self.recurrent_dropout if self.training else 0.0
        if self.cell_name == "ln_lstm":
            output_BTH, state = self.ln_lstm(normed_BTH, state, None if steps is None else reset_BT, dropout)
        else:
            output_BTH, state = run_fused(self.cell, normed_BTH, state, steps, dropout)
        x_BTH = x_BTH + self.dropout(output_BTH)
        return (x_BTH if self.feed_forward is None else self.feed_forward(x_BTH)), state


class LSTMPreTrainedModel(PreTrainedModel):
    """What the models below share: the configuration's class and fresh weights."""

    config_class = LSTMConfig
    base_model_prefix = "model"
    _no_split_modules = ["LSTMModel"]  # device_map: the state of all layers is one tensor

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal linears and embeddings, Xavier LSTM matrices, zero biases
        if isinstance(module, nn.LSTM):
            # Gates are stacked i, f, g, o and torch adds b_ih and b_hh. A forget bias of 1 in one of them
            # starts f at 0.73 instead of 0.5, so gradients survive more steps (Jozefowicz et al., ICML 2015).
            bias_4H = torch.zeros_like(module.get_parameter("bias_ih_l0"))
            bias_4H[module.hidden_size : 2 * module.hidden_size] = 1.0
            init.copy_(module.get_parameter("bias_ih_l0"), bias_4H)  # `init` leaves loaded weights alone
        elif isinstance(module, nn.GRU):  # the same for z, which says what is kept
            for name, parameter in module.named_parameters():
                init.xavier_uniform_(parameter) if "weight" in name else init.zeros_(parameter)
            bias_3H = torch.zeros_like(module.get_parameter("bias_ih_l0"))
            bias_3H[module.hidden_size : 2 * module.hidden_size] = 1.0
            init.copy_(module.get_parameter("bias_ih_l0"), bias_3H)
        elif isinstance(module, LayerNormLSTM):
            init.xavier_uniform_(module.weight_ih)
            init.xavier_uniform_(module.weight_hh)
            bias_4H = torch.zeros_like(module.bias)
            bias_4H[module.hidden_size : 2 * module.hidden_size] = 1.0
            init.copy_(module.bias, bias_4H)
        elif isinstance(module, WindowAttention):
            init.zeros_(module.value_gate)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError, always."""
        raise ValueError(
            "gradient checkpointing is not supported: the memory goes to the logits (B x T x V), which it "
            "would not save; use fewer or shorter sequences, or a loss computed in chunks"
        )


class LSTMModel(LSTMPreTrainedModel):
    """Token ids to z_BTd, the vector in the teacher's width that the head turns into logits."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        # No padding_idx: teachers often pad with their end-of-text token, whose embedding must train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.input_projection = nn.Linear(config.embedding_size, config.hidden_size)
        self.input_dropout = Dropout(config.input_dropout, config.variational_dropout)
        self.layers = nn.ModuleList([LSTMBlock(config) for _ in range(config.num_layers)])
        self.attention = WindowAttention(config) if config.attention_window else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_projection = nn.Linear(config.hidden_size, config.embedding_size)
        self.post_init()

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of the parts of the state, with their axes."""
        return STATE_NAMES[self.config.cell] + (MEMORY_NAMES if self.attention else ())

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        reset_mask: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """As `LSTMForCausalLM.forward`, without the head: `last_hidden_state` is z_BTd."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids (B, T) and inputs_embeds (B, T, embedding_size)")
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        embedded_BTd = inputs_embeds if input_ids is None else self._embed(input_ids)
        assert embedded_BTd is not None, "one of the two was given"
        B, T = embedded_BTd.shape[:2]
        cache = LSTMCache() if past_key_values is None else past_key_values

        reset_BT = reset_mask
        if reset_BT is not None and (reset_BT.shape != (B, T) or reset_BT.dtype != torch.bool):
            found = f"{reset_BT.dtype} {tuple(reset_BT.shape)}"
            raise ValueError(f"reset_mask must be torch.bool {(B, T)}, found {found}")
        if attention_mask is not None:
            start_BT = _starts_after_padding(attention_mask, T, use_cache)
            reset_BT = start_BT if reset_BT is None else reset_BT | start_BT

        input_BTH = self.input_dropout(self.input_projection(embedded_BTd))
        before = cache.state

        def read(end: int) -> tuple[Tensor, State]:
            """The residual stream of the first `end` positions, and the state after them."""
            x_BtH = input_BTH[:, :end]
            reset_Bt = None if reset_BT is None else reset_BT[:, :end]
            steps = None if reset_Bt is None else Steps.of(reset_Bt)
            stacked = before[: len(STATE_NAMES[self.config.cell])]
            memory, states = before[len(stacked) :], []
            for number, block in enumerate(self.layers):
                state = tuple(part_LBH[number : number + 1] for part_LBH in stacked) or None
                x_BtH, state = block(x_BtH, state, reset_Bt, steps)
                states.append(state)
                # After the last block but one, as in SHA-RNN: the last one can use what was found.
                if self.attention is not None and number == max(len(self.layers) - 2, 0):
                    x_BtH, memory = self.attention(x_BtH, memory, reset_Bt)
            return x_BtH, (*(torch.cat(parts) for parts in zip(*states, strict=True)), *memory)

        x_BTH, state = read(T)
        z_BTd = self.output_projection(self.norm(x_BTH))

        if use_cache:
            cache.update(state, T, None if self.training else read)
        returned: Any = cache if use_cache else None  # the library's type is its own Cache
        return BaseModelOutputWithPast(last_hidden_state=z_BTd, past_key_values=returned)

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedded_BTd = self.embed_tokens(input_ids)
        if self.training and self.config.embedding_dropout:
            kept_V1 = F.dropout(torch.ones_like(self.embed_tokens.weight[:, :1]), self.config.embedding_dropout)
            embedded_BTd = embedded_BTd * kept_V1[input_ids]
        return embedded_BTd


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """The student with its head; trains, generates, saves and loads like any causal LM of the library."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then leaves making the cache to us

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> bool:
        prepared = GenerationMixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LSTMCache()
        return prepared

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        reset_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Read T positions, from a zero state or from `past_key_values`.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, d) in their place.
            attention_mask: (B, S >= T), 0 for padding; the last T columns belong to the input, the earlier
                ones to tokens already read. Padding goes on the left: a row forgets it at its first real
                token, so a padded batch gives what its prompts give one by one.
            past_key_values: state to continue from; with `use_cache` (the default then) updated in place.
            labels: (B, T) as the library has them: the input itself, shifted here, -100 ignored.
            reset_mask: (B, T) bool, True where the state is zero before that position is read.
            use_cache: return the state. Default: if one was given, else the configuration's outside training.
            logits_to_keep: compute logits of only the last so many positions (0: all), or of these positions.
            position_ids: ignored (an LSTM counts for itself); assisted generation passes the target's.

        Returns:
            logits (B, T or fewer, V), `past_key_values` (an LSTMCache or None), and with labels the mean loss
            in nats per token.

        Raises:
            ValueError: both or neither of ids and embeddings; a mask of the wrong shape; holes in the
                attention mask; padding on the right when the state is returned.
        """
        output = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, reset_mask, use_cache, return_dict=True
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=output.past_key_values)


class LSTMForSequenceClassification(LSTMPreTrainedModel):
    """The student's body with a linear classifier; trains, saves, loads and serves pipelines as the library's do.

    The body reads from left to right, as a language model's does: a classifier can start from a distilled language
    model (`from_pretrained` of its folder takes the body), and can be asked at any token of a stream. Tang et al.
    (2019, arXiv 1903.12136) read in both directions.
    """

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.model = LSTMModel(config)
        self.score = nn.Linear(config.embedding_size, config.num_labels or 2)  # None is the library's word for 2
        self.post_init()

    @can_return_tuple  # return_dict=False
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Read whole sequences, each from a zero state.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, d) in their place.
            attention_mask: (B, T), 0 for padding, on the left or on the right; a padded batch gives what its rows give
                one by one. Without it all tokens are read.
            labels: (B,) class ids, -100 ignored; or what the configuration's `problem_type` asks for.
            token_type_ids: ignored; tokenizers of encoders pass them.

        Returns:
            logits (B, `num_labels`), and with labels the library's loss for the `problem_type`.

        Raises:
            ValueError: both or neither of ids and embeddings; a mask of the wrong shape or with holes.
        """
        output = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, use_cache=False, return_dict=True)
        logits_BC = self.score(self._pool(output.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits_BC, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)

    def _pool(self, z_BTd: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
        """One vector (B, d) of each sequence, from its real tokens."""
        if attention_mask_BT is None:
            attention_mask_BT = z_BTd.new_ones(z_BTd.shape[:2])
        real_BT1 = attention_mask_BT.bool()[..., None]
        match self.config.pooling:
            case "mean":
                return z_BTd.masked_fill(~real_BT1, 0.0).sum(1) / real_BT1.sum(1).clamp_min(1)
            case "max":
                return z_BTd.masked_fill(~real_BT1, torch.finfo(z_BTd.dtype).min).amax(1)
        position_T = torch.arange(z_BTd.shape[1], device=z_BTd.device)
        last_B = ((position_T + 1) * real_BT1[..., 0]).argmax(1)
        return z_BTd[torch.arange(len(z_BTd), device=z_BTd.device), last_B]


def _starts_after_padding(attention_mask_BS: Tensor, T: int, use_cache: bool) -> Tensor:
    """True at the first real token after padding, among the last T columns. Costs one device sync."""
    if attention_mask_BS.ndim != 2 or attention_mask_BS.shape[1] < T:
        raise ValueError(f"attention_mask must be (B, at least {T}), found {tuple(attention_mask_BS.shape)}")
    real_Bt = attention_mask_BS[:, -T - 1 :].bool()  # one column before the input, if there is one
    start_Bt = F.pad(real_Bt[:, 1:] & ~real_Bt[:, :-1], (1, 0))
    end_Bt = F.pad(real_Bt[:, :-1] & ~real_Bt[:, 1:], (1, 0))
    if end_Bt.any():
        if use_cache:
            raise ValueError(
                "attention_mask has padding after real tokens, which would be read into the returned state; "
                "pad on the left (tokenizer.padding_side='left') or pass use_cache=False"
            )
        if (end_Bt.cumsum(1).bool() & start_Bt).any():
            raise ValueError("attention_mask has padding between real tokens; pad on the left")
    return start_Bt[:, -T:]


# The Auto classes find these by `model_type`; `save_pretrained` copies this file into the folder and points
# `auto_map` at it, which is what `trust_remote_code=True` reads.
AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LSTMConfig, LSTMForSequenceClassification, exist_ok=True)
LSTMConfig.register_for_auto_class()
LSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LSTMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
